"""The log files of an attempt: find them, and read their last or new lines."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rltrain.run.layout import RunLayout

# In the order in which they are shown: who tells most about an end comes last.
ROLES = ("srun", "router", "engine", "rollout", "trainer", "supervisor")

# The parts of an engine that spans nodes are engine-0.log, engine-0.node1.log, …
_NAME = re.compile(r"(?P<role>[a-z_]+)(?:-(?P<index>\d+)(?:\.node\d+)?)?")
_TAIL_BLOCK = 64 * 1024
_DISK_IS_FULL = ("No space left on device", "Disk quota exceeded", "the disk is full")


@dataclass
class LogFile:
    """One log; remembers how far it has been read.

    Attributes:
        attempt: None for the output of the job itself, before the supervisor had a log.
        role, index: who wrote it; the supervisor has no index.
    """

    path: Path
    attempt: int | None
    role: str
    index: int | None
    offset: int = field(default=0, compare=False)

    @property
    def name(self) -> str:
        """As the file is called, without its ending: `engine-0`."""
        return self.path.stem

    def matches(self, role: str | None, index: int | None) -> bool:
        """Whether it is of this role and index; None stands for any."""
        return role in (None, self.role) and index in (None, self.index)

    def skip(self) -> None:
        """Skip everything that has been written so far."""
        self.offset = self.path.stat().st_size

    def tail(self, count: int) -> list[str]:
        """The last `count` whole lines; `read_new` goes on after them."""
        with self.path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            start, data = end, b""
            while start > 0 and data.count(b"\n") <= count:
                step = min(_TAIL_BLOCK, start)
                start -= step
                file.seek(start)
                data = file.read(step) + data
        whole = data[: data.rfind(b"\n") + 1]
        self.offset = start + len(whole)
        lines = _decode(whole)
        return lines[max(0, len(lines) - count) :]

    def read_new(self) -> list[str]:
        """Whole lines that have been written since the last call."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return _decode(whole)

    def read_rest(self) -> list[str]:
        """All new text, even a last line without its end. For a log that is no longer written."""
        lines = self.read_new()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            rest = file.read()
        self.offset += len(rest)
        return lines + ([rest.decode(errors="replace")] if rest else [])


def _decode(data: bytes) -> list[str]:
    # Not splitlines(): a progress bar's \r and a form feed are part of a line.
    return data.decode(errors="replace").split("\n")[:-1]


def find_logs(layout: RunLayout, attempt: int) -> list[LogFile]:
    """Logs of an attempt in the order of `ROLES`."""
    found = []
    for path in layout.log_dir(attempt).glob("*.log"):
        if path.stem.startswith("srun-") and path.stat().st_size:  # what Slurm says of a role's step
            found.append(LogFile(path, attempt, "srun", None))
        elif match := _NAME.fullmatch(path.stem):
            index = int(match["index"]) if match["index"] else None
            found.append(LogFile(path, attempt, match["role"], index))
    return sorted(found, key=_order)


def job_logs(layout: RunLayout) -> list[LogFile]:
    """Output of the newest job itself: the only output of a job that failed before its supervisor began."""
    files = [path for ending in ("log", "out", "err") for path in layout.submitit.glob(f"*.{ending}")]
    filled = [path for path in files if path.stat().st_size]
    newest = max(filled, key=lambda path: path.stat().st_mtime, default=None)
    return [LogFile(newest, None, "job", None)] if newest else []


def _order(file: LogFile) -> tuple[int, str, int]:
    known = ROLES.index(file.role) if file.role in ROLES else len(ROLES)
    return known, file.role, file.index or 0


def last_lines(path: Path, count: int, max_bytes: int = 64 * 1024) -> list[str]:
    """The last lines of a text file, looking at no more than `max_bytes` of it; none if there is no such file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - max_bytes))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def disk_is_full(lines: Sequence[str]) -> bool:
    """Whether a log says so."""
    return any(sign in line for line in lines for sign in _DISK_IS_FULL)
