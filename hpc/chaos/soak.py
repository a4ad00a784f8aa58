"""A long run without faults: what of each role grows that should not.

Memory, open files and threads of every role are read from /proc while the run goes on, and what lies on the disk. The
last quarter of the readings is compared with the second; the first is for warming up.
"""

from __future__ import annotations

import os
import statistics
import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hpc.chaos.actions import Process, processes_of, supervisor_of

_READ_SECONDS = 1.0
_MIB = 1 << 20
# What may come on top from the second quarter to the last, per 1000 steps between them.
_MEMORY_BYTES = 6 * _MIB
_FILES = 2
_THREADS = 2
# In a run directory: samples, checkpoints and weights, whose number and size flags say.
RESULTS = ("rollouts", "rollouts_trainer", "checkpoints", "weights", "profile")


@dataclass(frozen=True)
class Reading:
    """What a role had at one moment: all its processes together, and what they started.

    Attributes:
        step: that was trained last.
        memory: bytes that are its own (not those of files that others map too).
        files: open ones.
    """

    step: int
    memory: int
    files: int
    threads: int


@dataclass
class Growth:
    """What was read of a run until now.

    Attributes:
        roles: readings of each role, and of `supervisor` and `srun`, in order.
        disk: step, and bytes and number of files below each name in the run directory, in order.
    """

    roles: dict[str, list[Reading]] = field(default_factory=lambda: defaultdict(list))
    disk: list[tuple[int, dict[str, tuple[int, int]]]] = field(default_factory=list)


class Watcher:
    """Reads while a block runs."""

    def __init__(self, run_dir: Path) -> None:
        self.growth = Growth()
        self._run_dir, self._over = run_dir, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_READ_SECONDS):
            step = _last_step(self._run_dir / "metrics.jsonl")
            if step is None:
                continue
            for role, reading in read_roles(self._run_dir, step).items():
                self.growth.roles[role].append(reading)
            self.growth.disk.append((step, read_disk(self._run_dir)))


def read_roles(run_dir: Path, step: int) -> dict[str, Reading]:
    """What each role of a run has now."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    processes = processes_of(run_dir)
    own = {pid for process in processes if (pid := supervisor_of(process)) is not None}
    for role, pid in [
        *((_role_of(each), each.pid) for each in processes),
        *(("supervisor", pid) for pid in own),
    ]:
        with suppress(OSError, IndexError):
            for index, value in enumerate(_read_process(pid)):
                sums[role][index] += value
    return {role: Reading(step, *values) for role, values in sums.items()}


def _role_of(process: Process) -> str:
    if Path(process.command[0]).name == "srun":
        return "srun"
    if "SLURMLIME_ROLE" not in process.env:  # the canary
        return Path(process.command[0]).name
    return f"{process.env['SLURMLIME_ROLE']}-{process.env['SLURMLIME_INDEX']}"


def _read_process(pid: int) -> tuple[int, int, int]:
    """Memory, open files and threads."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    memory = (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    return memory, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208


def read_disk(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Bytes and number of files below each name in a run directory."""
    sums: dict[str, tuple[int, int]] = {}
    for path in run_dir.rglob("*"):
        with suppress(OSError):
            name = path.relative_to(run_dir).parts[0]
            size, count = sums.get(name, (0, 0))
            sums[name] = (size + path.lstat().st_size, count + 1) if path.is_file() else (size, count)
    return sums


def _last_step(metrics: Path) -> int | None:
    with suppress(OSError):
        return metrics.read_bytes().count(b"\n")
    return None


def judge(growth: Growth, files_per_step: float, bytes_per_step: float) -> tuple[list[str], list[str]]:
    """A table of what was read, and what grows that should not, in words.

    Args:
        growth: of a run that has ended.
        files_per_step: that the run directory may get.
        bytes_per_step: that it may get beside `RESULTS`, which a run is for.
    """
    lines = [f"{'role':14}{'memory, MiB':>20}{'open files':>16}{'threads':>14}   second quarter → last"]
    problems = []
    for role, readings in sorted(growth.roles.items()):
        early, late = _quarters(readings)
        if early is None or late is None:
            continue
        lines.append(f"{role:14}{early.memory / _MIB:11.1f} → {late.memory / _MIB:6.1f}"
                     f"{early.files:9} → {late.files:4}{early.threads:8} → {late.threads:3}")  # fmt: skip
        share = (late.step - early.step) / 1000
        for what, allowed in [
            ("memory", _MEMORY_BYTES * max(1.0, share)),
            ("files", _FILES),
            ("threads", _THREADS),
        ]:
            if (more := getattr(late, what) - getattr(early, what)) > allowed:
                problems.append(f"{role} has {more} more {what} at step {late.step} than at {early.step}")
    disk_lines, disk_problems = _judge_disk(growth.disk, files_per_step, bytes_per_step)
    return lines + disk_lines, problems + disk_problems


def _quarters(readings: Sequence[Reading]) -> tuple[Reading, Reading] | tuple[None, None]:
    """Medians over the second and the last quarter."""
    size = len(readings) // 4
    if not size:
        return None, None
    early, late = readings[size : 2 * size], readings[-size:]
    return _median(early), _median(late)


def _median(readings: Sequence[Reading]) -> Reading:
    names = ("step", "memory", "files", "threads")
    return Reading(*(int(statistics.median(getattr(each, name) for each in readings)) for name in names))


def _judge_disk(
    disk: Sequence[tuple[int, dict[str, tuple[int, int]]]], files_per_step: float, bytes_per_step: float
) -> tuple[list[str], list[str]]:
    if len(disk) < 4:
        return [], []
    (begin, early), (end, late) = disk[len(disk) // 4], disk[-1]
    steps = max(1, end - begin)
    lines = [f"{'on the disk':26}{'bytes a step':>14}{'files a step':>14}{'MiB at the end':>16}"]
    for name, (size, count) in sorted(late.items(), key=lambda item: -item[1][0]):
        before_size, before_count = early.get(name, (0, 0))
        lines.append(f"{name:26}{(size - before_size) / steps:14.0f}{(count - before_count) / steps:14.2f}"
                     f"{size / _MIB:16.2f}")  # fmt: skip
    problems = []
    more = sum(count for _, count in late.values()) - sum(count for _, count in early.values())
    if more > files_per_step * steps + 5:
        problems.append(f"the run directory got {more} files in {steps} steps")
    grown = {
        name: size - early.get(name, (0, 0))[0] for name, (size, _) in late.items() if name not in RESULTS
    }
    if (total := sum(grown.values())) > bytes_per_step * steps:
        most = max(grown, key=lambda name: grown[name])
        problems.append(f"the run directory got {total / steps:.0f} bytes a step, most of them in {most}")
    return lines, problems
