"""What each fault of a storm does to the cluster, the job and the run directory."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hpc.chaos import clocks
from hpc.chaos.faults import Fault, NobodyError
from hpc.chaos.isolated import Stops
from hpc.sandbox import Sandbox
from hpc.sandbox.packages import find_program
from hpc.slurm.client import SlurmClient, SlurmError, SlurmUnavailableError
from rltrain.run.layout import RunLayout
from rltrain.run.processes import descendants, parse_stat

Undo = Callable[[], object]
_SLOW_SECONDS = 0.4  # that a slow disk stops at a time
_STALL_SECONDS = 60.0  # more than any fault lasts
_LATE_SECONDS = 8
_SILENCE_SECONDS = 60.0  # of a slurmctld that another fault has silenced
_TORN = b'{"step": 3, "atte'  # of a line of metrics or events


# Fakes, which only inject faults: these stand before Slurm's programs on the PATH of a storm and of its job.
_LATE_SBATCH = """\
#!/bin/sh
said=$({program} "$@")
code=$?
if mv {mark} {mark}.seen 2>/dev/null; then sleep {seconds}; fi
echo "$said"
exit $code
"""
_REFUSED_SRUN = """\
#!/bin/sh
if [ -e {mark} ]; then
    echo "srun: error: Unable to create step for job $SLURM_JOB_ID: Requested nodes are busy" >&2
    exit 1
fi
exec {program} "$@"
"""


@dataclass(frozen=True)
class Process:
    """A process on any node, as this machine sees it."""

    pid: int
    command: tuple[str, ...]
    env: dict[str, str]


def processes_of(run_dir: Path) -> list[Process]:
    """The living processes of a run, on all nodes: those that have its directory in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            env = _split_env((path / "environ").read_bytes())
            if env.get("SLURMLIME_RUN_DIR") == str(run_dir):
                command = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if parse_stat((path / "stat").read_text(errors="replace"))[2] not in "ZX":
                    found.append(Process(int(path.name), tuple(command[:-1]), env))
    return found


@dataclass(frozen=True)
class Fakes:
    """Where the fakes of Slurm's programs lie, and the marks that have them do their fault."""

    directory: Path

    @property
    def late(self) -> Path:
        """While it is there, the next sbatch is late."""
        return self.directory / "late"

    @property
    def refused(self) -> Path:
        """While it is there, no srun creates a step."""
        return self.directory / "refused"

    def make(self) -> None:
        """Write them."""
        self.directory.mkdir(exist_ok=True)
        for name, text, mark in [("sbatch", _LATE_SBATCH, self.late), ("srun", _REFUSED_SRUN, self.refused)]:
            program = shlex.quote(find_program(name))
            words = text.format(program=program, mark=shlex.quote(str(mark)), seconds=_LATE_SECONDS)
            made = self.directory / f".{name}"
            made.write_text(words)
            made.chmod(0o755)
            made.replace(self.directory / name)


def fakes_of(cluster: Sandbox) -> Fakes:
    """Those of storms on a sandbox."""
    return Fakes(cluster.directory / "fakes")


class Weather:
    """Does faults to one run on a sandbox."""

    def __init__(self, cluster: Sandbox, layout: RunLayout) -> None:
        self._cluster, self._layout = cluster, layout

    def do(self, fault: Fault, job: str) -> Undo | None:
        """Do a fault; returns what ends it, for one that lasts.

        Raises:
            NobodyError: it has no target.
        """
        act: Callable[[Fault, str], Undo | None] = getattr(self, "_" + fault.kind.replace("-", "_"))
        return act(fault, job)

    def _kill(self, fault: Fault, job: str) -> None:
        _signal(self._role(fault), signal.SIGKILL)

    def _freeze(self, fault: Fault, job: str) -> Undo:
        return _stopped(self._role(fault))

    def _end_step(self, fault: Fault, job: str) -> None:
        role, index = _role_and_index(fault)
        sruns = [p.pid for p in processes_of(self._layout.root)
                 if Path(p.command[0]).name == "srun" and f"--job-name={role}" in p.command]  # fmt: skip
        _signal(_one(sorted(sruns), index), signal.SIGKILL)

    def _lose_step(self, fault: Fault, job: str) -> None:
        above = {_ancestor(pid, "slurmstepd") for pid in self._role(fault)} - {None}
        _signal([pid for pid in above if pid], signal.SIGKILL)

    def _requeue(self, fault: Fault, job: str) -> None:
        self._slurm("scontrol", "requeue", job)

    def _requeue_part(self, fault: Fault, job: str) -> Undo:
        node = self._slurm("squeue", "-h", "-j", job, "-o", "%B").split()[:1]
        if node not in [[name] for name in self._cluster.spec.node_names]:
            raise NobodyError("the job runs nowhere")
        self._cut_power(node[0])
        return lambda: self._cluster.power_on(node[0])

    def _warn(self, fault: Fault, job: str) -> None:
        self._slurm("scancel", "--batch", "--signal=USR2", job)

    def _terminate(self, fault: Fault, job: str) -> None:
        self._slurm("scancel", "--signal=TERM", job)

    def _suspend(self, fault: Fault, job: str) -> Undo:
        self._slurm("scontrol", "suspend", job)
        return lambda: self._slurm("scontrol", "resume", job)

    def _power_off(self, fault: Fault, job: str) -> Undo:
        assert fault.target is not None
        node = fault.target
        self._cut_power(node)
        return lambda: self._cluster.power_on(node)

    def _cut_power(self, node: str) -> None:
        self._cluster.power_off(node, notice=False)
        with contextlib.suppress(NobodyError):  # slurmctld notices by itself, later
            self._slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=power_off")

    def _cut_off(self, fault: Fault, job: str) -> Undo:
        if not self._cluster.spec.networks:
            raise NobodyError(
                "the nodes have no networks of their own: that takes root, iproute2 and e2fsprogs"
            )
        assert fault.target is not None
        node = fault.target
        self._cluster.cut_off(node)
        return lambda: self._cluster.join(node)

    def _lose_names(self, fault: Fault, job: str) -> Undo:
        hosts = self._cluster.directory / "etc" / "hosts"  # the same file on all nodes, by a bind mount
        text = hosts.read_text()
        if "node" not in text:
            raise NobodyError("they are lost already")
        hosts.write_text("127.0.0.1 localhost\n")
        return lambda: hosts.write_text(text)

    def _fill_disk(self, fault: Fault, job: str) -> Undo:
        filler = self._own_disk() / ".filler"
        with filler.open("wb") as file:
            _fill(file)
        return filler.unlink

    def _lock_checkpoints(self, fault: Fault, job: str) -> Undo:
        self._own_disk()
        directory = self._layout.checkpoints
        _call("chattr", "+i", str(directory))
        return lambda: _call("chattr", "-i", str(directory))

    def _slow_disk(self, fault: Fault, job: str) -> Undo:
        return Stops(self._own_disk(), seconds=_SLOW_SECONDS).end

    def _stall_disk(self, fault: Fault, job: str) -> Undo:
        return Stops(self._own_disk(), seconds=_STALL_SECONDS).end

    def _clock_ahead(self, fault: Fault, job: str) -> Undo:
        return self._jump(fault, hours=1)

    def _clock_behind(self, fault: Fault, job: str) -> Undo:
        return self._jump(fault, hours=-1)

    def _jump(self, fault: Fault, hours: int) -> Undo:
        assert fault.target is not None
        known = ((process.pid, process.env) for process in processes_of(self._layout.root))
        return clocks.jump(fault.target, known, hours)

    def _own_disk(self) -> Path:
        disk = self._layout.root.parent
        # What we do to a shared disk, everybody would feel.
        if disk.stat().st_dev == self._cluster.directory.stat().st_dev:
            raise NobodyError("the runs have no disk of their own: that takes root, iproute2 and e2fsprogs")
        return disk

    def _silence(self, fault: Fault, job: str) -> Undo:
        self._cluster.silence()
        return self._cluster.speak

    def _restart_controller(self, fault: Fault, job: str) -> None:
        self._cluster.restart_controller()

    def _fail_over(self, fault: Fault, job: str) -> Undo:
        try:
            self._cluster.fail_over()
        except TimeoutError:
            self._cluster.restart_controller()
            raise
        return self._cluster.restart_controller

    def _cancel(self, fault: Fault, job: str) -> None:
        self._slurm("scancel", job)

    def _kill_supervisor(self, fault: Fault, job: str) -> None:
        _signal(self._supervisor(), signal.SIGKILL)

    def _kill_batch(self, fault: Fault, job: str) -> None:
        _signal([_parent(pid)[0] for pid in self._supervisor()], signal.SIGKILL)

    def _supervisor(self) -> list[int]:
        found = {supervisor_of(process) for process in processes_of(self._layout.root)} - {None}
        if not found:
            raise NobodyError("no supervisor that has started a role")
        return [pid for pid in found if pid]

    def _freeze_supervisor(self, fault: Fault, job: str) -> Undo:
        return _stopped(self._supervisor())

    def _late_sbatch(self, fault: Fault, job: str) -> None:
        fakes_of(self._cluster).late.touch()
        self._slurm("scancel", job)

    def _refuse_step(self, fault: Fault, job: str) -> Undo:
        pids, mark = self._role(fault), fakes_of(self._cluster).refused
        mark.touch()
        _signal(pids, signal.SIGKILL)
        return lambda: mark.unlink(missing_ok=True)

    def _stall_engine(self, fault: Fault, job: str) -> Undo:
        return _stopped(self._below(fault.target, "scheduler"))

    def _hang_reward(self, fault: Fault, job: str) -> Undo:
        return _stopped(self._below("rollout-0", "rltrain.rewards.worker"))

    def _below(self, role: str | None, word: str) -> list[int]:
        """Processes that a role has started and that have this word in their command."""
        above = self._role(Fault("", 0, role))
        found = [pid for root in above for pid in descendants(root) if word in _command(pid)]
        if not found:
            raise NobodyError(f"nothing of {role} is called {word}")
        return found

    def _tear_metrics(self, fault: Fault, job: str) -> None:
        _append(self._layout.metrics, _TORN)

    def _tear_events(self, fault: Fault, job: str) -> None:
        _append(self._layout.events, _TORN)

    def _role(self, fault: Fault) -> list[int]:
        """The processes of a role, without those that started it."""
        role, index = _role_and_index(fault)
        found = [
            process.pid
            for process in processes_of(self._layout.root)
            if process.env.get("SLURMLIME_ROLE") == role
            and process.env.get("SLURMLIME_INDEX") == str(index)
            and process.command[1:2] == ("-m",)
        ]
        if not found:
            raise NobodyError(f"no {fault.target}")
        return found

    def _slurm(self, *command: str) -> str:
        client, deadline = SlurmClient(self._cluster.env), time.monotonic() + _SILENCE_SECONDS
        while True:
            try:
                return client.run(*command)
            except SlurmUnavailableError as error:
                if time.monotonic() > deadline:
                    raise NobodyError(str(error)) from None
                time.sleep(0.5)
            except SlurmError as error:
                raise NobodyError(str(error)) from None


def _fill(file: BinaryIO) -> None:
    """Write until there is no room."""
    for size in (1 << 24, 1 << 20, 1 << 12):
        with contextlib.suppress(OSError):
            while True:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NobodyError(done.stderr.strip())


def _split_env(data: bytes) -> dict[str, str]:
    pairs = (entry.partition(b"=") for entry in data.split(b"\0") if entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def _role_and_index(fault: Fault) -> tuple[str, int]:
    assert fault.target is not None
    role, _, index = fault.target.partition("-")
    return role, int(index)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _stopped(pids: Sequence[int]) -> Undo:
    _signal(pids, signal.SIGSTOP)
    return lambda: _signal(pids, signal.SIGCONT)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    return ""


def _one(pids: list[int], index: int) -> list[int]:
    if not pids:
        raise NobodyError("no srun of this role")
    return [pids[min(index, len(pids) - 1)]]


def _parent(pid: int) -> tuple[int, str]:
    """Parent and name of a process."""
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    return parse_stat(text)[1], text.partition("(")[2].rpartition(")")[0]


def _ancestor(pid: int, name: str) -> int | None:
    """The nearest process above one that has this name."""
    with contextlib.suppress(OSError):
        while pid > 1:
            parent, found = _parent(pid)
            if found == name:
                return pid
            pid = parent
    return None


def supervisor_of(process: Process) -> int | None:
    """The parent of an srun, which is the supervisor."""
    if not process.command or Path(process.command[0]).name != "srun":
        return None
    with contextlib.suppress(OSError):
        parent, _ = _parent(process.pid)
        name = _parent(parent)[1]
        return parent if name.startswith("python") else None
    return None


def _append(path: Path, data: bytes) -> None:
    if not path.exists():
        raise NobodyError(f"no {path.name}")
    with path.open("ab") as file:
        file.write(data)
