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
from hpc.slurm.states import JobState
from rltrain.run.errors import UserError
from rltrain.run.processes import parse_stat

_LOOK_SECONDS = 2.0
_QUEUE_SECONDS = 90.0  # more than a job waits on a cluster of its own, or takes to end
_ALL_IDLE = "all nodes are idle"
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
        self._waits_since: float | None = None
        self._ends_since: float | None = None

    def look(self, job: str, *, was_suspended: bool, is_calm: bool) -> None:
        """Mend what is to be mended, if the last look is a while ago.

        Args:
            job: of the run.
            was_suspended: whether it has been, at some time.
            is_calm: whether no fault lasts.
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
            self._ask_why_it_waits(records, is_calm)
            self._end_what_does_not_end(records, is_calm)

    def _ask_why_it_waits(self, records: list[JobRecord], is_calm: bool) -> None:
        """No job has to wait for long on a cluster where all is well; slurmctld may have lost sight of it."""
        waiting = [each for each in records if each.state.is_waiting]
        if not (is_calm and waiting):
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = time.monotonic()
        elif time.monotonic() > self._waits_since + _QUEUE_SECONDS:
            self._waits_since = None
            reasons = ", ".join(sorted({str(each.reason) for each in waiting}))
            nodes = states_of_nodes(self._client)
            print(f"the job waits ({reasons}; {nodes}): slurmctld is restarted", flush=True)
            for node in self._client.node_states():
                if node.state.startswith("down"):
                    self._cluster.power_on(node.name)
                elif node.state.startswith("drain"):
                    self._cluster.run("scontrol", "update", f"nodename={node.name}", "state=resume")
            self._cluster.restart_controller()

    def _end_what_does_not_end(self, records: list[JobRecord], is_calm: bool) -> None:
        """Slurm may lose the word that a job's processes are gone; nodes that start anew have none."""
        ending = [each for each in records if each.state is JobState.COMPLETING]
        if not (is_calm and ending):
            self._ends_since = None
        elif self._ends_since is None:
            self._ends_since = time.monotonic()
        elif time.monotonic() > self._ends_since + _QUEUE_SECONDS:
            self._ends_since = None
            nodes = sorted({node for each in ending for node in each.nodes})
            print(f"Slurm can't end the job on {', '.join(nodes)}: they are started anew", flush=True)
            try:
                for node in nodes:
                    # It may not take the word that the node is off, and notices by itself later.
                    with contextlib.suppress(subprocess.CalledProcessError):
                        self._cluster.power_off(node)
            finally:
                for node in nodes:
                    with contextlib.suppress(UserError, TimeoutError, subprocess.CalledProcessError):
                        self._cluster.power_on(node)

    def _undrain(self) -> None:
        """Slurm drains a node where it could not end a step because its slurmstepd was dead."""
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
            print(f"slurmctld counts GPUs of {', '.join(sorted(lost))} as used: it is restarted", flush=True)
            self._cluster.restart_controller()
        self._lost_gpus = lost


class NoClusterError(UserError):
    """The cluster does not come up."""


def bring_up(cluster: Sandbox) -> None:
    """Start a cluster, anew if it is up.

    Raises:
        NoClusterError: it does not come up.
    """
    try:
        cluster.down()
        cluster.up()
    except UserError as error:
        raise NoClusterError(str(error)) from error


def wait_for_nodes(cluster: Sandbox, seconds: float) -> None:
    """Return when every node is idle. Where one is not after `seconds`, the cluster is started anew.

    Raises:
        NoClusterError: it does not come up.
    """
    client, deadline = SlurmClient(cluster.env), time.monotonic() + seconds
    while (states := states_of_nodes(client)) != _ALL_IDLE:
        if time.monotonic() > deadline:
            print(f"after {seconds:.0f} s {states}: the cluster is started anew", flush=True)
            bring_up(cluster)
            break
        time.sleep(0.2)


def states_of_nodes(client: SlurmClient) -> str:
    """Which nodes are not idle, in words."""
    try:
        nodes = client.node_states()
    except (SlurmError, UserError) as error:
        return f"slurmctld does not answer: {error}"
    busy = [f"{node.name} is {node.state}" for node in nodes if node.state != "idle"]
    return ", ".join(busy) or _ALL_IDLE


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
