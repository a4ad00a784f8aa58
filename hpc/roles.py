"""The roles of a job that have been started, and how the death of one is told to people."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from hpc.launcher import Handle
from hpc.plan import MAIN_ROLE, RoleProcess

# Exit codes of roles.
EXIT_REQUEUE = 75  # saved, wants to run again
EXIT_NEVER_RESTART = 93  # running again would fail the same way
LAST_LINES = 20


class JobFailedError(RuntimeError):
    """A role died. The message names it, its exit code and its log, and shows the log's last lines.

    Attributes:
        never_restart: it said that running again would fail in the same way.
    """

    def __init__(self, message: str, never_restart: bool = False) -> None:
        super().__init__(message)
        self.never_restart = never_restart


@dataclass(frozen=True, eq=False)
class RunningRole:
    """A role's process, or several that were started together."""

    process: RoleProcess
    handle: Handle

    @property
    def failed(self) -> str:
        """Name of the process that failed first."""
        name = self.handle.failed_log().stem
        return name if name in self.process.names else self.process.name


def is_death(process: RoleProcess, code: int) -> bool:
    """Whether an exit code is bad news: only a trainer may end by itself, done or saved."""
    return process.role != MAIN_ROLE or code not in (0, EXIT_REQUEUE)


def failure(dead: list[RunningRole], restarts: int = 0) -> JobFailedError:
    """The error that says so; `restarts` is how often the first had been started again."""
    never = any(role.handle.poll() == EXIT_NEVER_RESTART for role in dead)
    text = describe_deaths(dead)
    if restarts:
        text += f"\nIt had been started again {restarts} time{'s' * (restarts > 1)} (--max-engine-restarts)."
    return JobFailedError(text, never)


def describe_deaths(dead: list[RunningRole]) -> str:
    """One paragraph on the role that died first, the last lines of its log, and who went with it.

    When one rank dies the others soon lose their connection: the log that fell silent first is the cause.
    """
    first, *others = sorted(dead, key=lambda role: role.handle.failed_log().stat().st_mtime)
    log = first.handle.failed_log()
    tail = last_lines(log, LAST_LINES)
    shown = "\n".join(f"  | {line}" for line in tail) if tail else "  (the log is empty)"
    text = f"{first.failed} {describe_exit(first.handle.poll())}. Its log, {log}, ends:\n{shown}"
    also = ", ".join(
        f"{role.failed} {describe_exit(role.handle.poll())} ({role.handle.failed_log()})" for role in others
    )
    return f"{text}\nAfter it, {also}." if also else text


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "is running"
    if code >= 0:
        return f"exited with code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def last_lines(path: Path, count: int, max_bytes: int = 64 * 1024) -> list[str]:
    """The last lines of a text file, looking at no more than `max_bytes` of it."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - max_bytes))
        return file.read().decode(errors="replace").splitlines()[-count:]
