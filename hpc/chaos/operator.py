"""What an operator of a cluster does about Slurm's own slips, which no run can mend."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from hpc.sandbox import Sandbox
from hpc.slurm.client import SlurmClient, SlurmError
from hpc.slurm.records import JobRecord
from rltrain.run.errors import UserError
from rltrain.run.processes import parse_stat

_LOOK_SECONDS = 2.0
_GPUS_OF_NODES = "NodeHost:64,StateLong:64,GresUsed:64"


class Operator:
    """Looks after the cluster of a storm.

    Args:
        cluster: that is up.
        submitit: the run's directory of that name, which its batch processes have in their command.
    """

    def __init__(self, cluster: Sandbox, submitit: Path) -> None:
        self._cluster, self._submitit = cluster, submitit
        self._client = SlurmClient(cluster.env)
        self._looked = 0.0
        self._lost_gpus: set[str] = set()

    def look(self, job: str, *, was_suspended: bool) -> None:
        """Mend what is to be mended, if the last look is a while ago.

        Args:
            job: of the run.
            was_suspended: whether it has been, at some time.
        """
        if time.monotonic() < self._looked + _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        with contextlib.suppress(SlurmError, UserError, TimeoutError, subprocess.CalledProcessError):
            self._undrain()
            records = self._client.squeue([job])
            if was_suspended:
                self._after_suspension(job, records)
            self._count_gpus(records)

    def _undrain(self) -> None:
        """Slurm drains a node where it could not end a step, as its slurmstepd was dead."""
        for node in self._client.node_states():
            if node.state.startswith("drain") and node.reason == "Kill task failed":
                self._cluster.run("scontrol", "update", f"nodename={node.name}", "state=resume")

    def _after_suspension(self, job: str, records: list[JobRecord]) -> None:
        """A job that lost a node while it was suspended is held; one that was requeued then may start stopped."""
        if any(each.state.is_waiting and str(each.reason).startswith("JobHeld") for each in records):
            self._cluster.run("scontrol", "release", job)
        if records and all(each.state == "RUNNING" for each in records):
            for pid in stopped_processes(str(self._submitit)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _count_gpus(self, records: list[JobRecord]) -> None:
        """slurmctld 22.05 may take a GPU for used for ever that a requeued job had."""
        lost = idle_nodes_with_used_gpus(self._cluster.run("sinfo", "-h", "-N", "-O", _GPUS_OF_NODES))
        # A job that is suspended keeps its GPUs on idle nodes.
        if lost & self._lost_gpus and any(each.state.is_waiting for each in records):
            print(f"slurmctld takes GPUs of {', '.join(sorted(lost))} for used: it is restarted", flush=True)
            self._cluster.restart_controller()
        self._lost_gpus = lost


def idle_nodes_with_used_gpus(listed: str) -> set[str]:
    """From lines of sinfo: names of nodes that are idle, and of which slurmctld says that GPUs are used."""
    fields = (line.split() for line in listed.splitlines())
    return {
        words[0]
        for words in fields
        if words[1] in ("idle", "planned") and re.search(r":[1-9]\d*\(", words[2])
    }


def stopped_processes(word: str) -> list[int]:
    """Ids of processes that SIGSTOP has stopped and that have this word in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_text(errors="replace").split("\0")
            if word in words and parse_stat((path / "stat").read_text(errors="replace"))[2] == "T":
                found.append(int(path.name))
    return found
