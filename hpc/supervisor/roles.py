"""The started roles of a job, and the message about the death of one."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.planning.processes import MAIN_ROLE, RoleProcess
from hpc.runs.log_files import disk_is_full, last_lines
from hpc.supervisor.causes import Cause
from hpc.supervisor.launcher import Handle
from rltrain.run.errors import EXIT_NEVER_RESTART, EXIT_NO_SUPERVISOR, EXIT_REQUEUE

LAST_LINES = 20
_LINES_OF_A_CAUSE = 100  # warnings, and what libraries say while they end, stand around it
_RAISED = re.compile(r"(?:\[rank\d+\]: )?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)(?:: .*)?)")


class JobFailedError(RuntimeError):
    """A role died. The message names it, its exit code and its log, and shows the log's last lines.

    Attributes:
        never_restart: it said that running again would fail in the same way.
        cause: whose failure it was.
    """

    def __init__(self, message: str, never_restart: bool = False, cause: Cause = Cause.CODE) -> None:
        super().__init__(message)
        self.never_restart, self.cause = never_restart, cause


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
    """True if an exit code means a failure. Only a trainer may end by itself, done or saved."""
    return process.role != MAIN_ROLE or code not in (0, EXIT_REQUEUE)


def failure(dead: list[RunningRole], restarts: int = 0) -> JobFailedError:
    """The error that reports the dead roles; `restarts` counts how often the first had been started again."""
    never = any(role.handle.poll() == EXIT_NEVER_RESTART for role in dead)
    text = describe_deaths(dead)
    if restarts:
        text += f"\nIt had been started again {restarts} time{'s' * (restarts > 1)} (--max-engine-restarts)."
    return JobFailedError(text, never, _cause(dead))


def unproven_end(trainers: list[RunningRole]) -> JobFailedError:
    """The error for trainers that ended as if they were done, without having written that the run is finished."""
    first = min(trainers, key=lambda role: role.handle.poll() is not None)  # one that has not even ended
    reason = next((end.reason for role in trainers if (end := role.handle.end()).reason), "")
    text = f"{first.failed} {describe_exit(first.handle.poll())} before it reported that all steps are done"
    text += f" ({reason})" if reason else ""
    log = first.handle.failed_log()
    return JobFailedError(f"{text}. Its log, {log}, ends:\n{_tail(log)}", cause=Cause.UNKNOWN)


def _cause(dead: list[RunningRole]) -> Cause:
    causes = [role.handle.end().cause for role in _first_to_last(dead)]
    # Those that lose a node's processes, or a role that did not hear from us, fail, too.
    if Cause.CLUSTER not in causes and any(role.handle.poll() == EXIT_NO_SUPERVISOR for role in dead):
        return Cause.UNKNOWN
    return Cause.CLUSTER if Cause.CLUSTER in causes else causes[0]


def _first_to_last(dead: list[RunningRole]) -> list[RunningRole]:
    """When one rank dies the others soon lose their connection: the log that fell silent first is the cause."""
    return sorted(dead, key=lambda role: _last_word(role.handle.failed_log()))


def _last_word(log: Path) -> float:
    """When a log was written to last; one that could not even be made was silent first."""
    try:
        return log.stat().st_mtime
    except OSError:
        return 0.0


def describe_deaths(dead: list[RunningRole]) -> str:
    """One paragraph on the role that died first, the last lines of its log, and who went with it."""
    first, *others = _first_to_last(dead)
    log, reason = first.handle.failed_log(), first.handle.end().reason
    words = [word for word in (reason, find_cause(last_lines(log, _LINES_OF_A_CAUSE))) if word]
    why = f": {'; '.join(words)}" if words else ""
    text = f"{first.failed} {describe_exit(first.handle.poll())}{why}. Its log, {log}, ends:\n{_tail(log)}"
    also = ", ".join(
        f"{role.failed} {describe_exit(role.handle.poll())} ({role.handle.failed_log()})" for role in others
    )
    return f"{text}\nAfter it, {also}." if also else text


def _tail(log: Path) -> str:
    tail = last_lines(log, LAST_LINES)
    return "\n".join(f"  | {line}" for line in tail) if tail else "  (the log is empty)"


def find_cause(lines: Sequence[str]) -> str | None:
    """The line of a failed role's log that says why it failed; warnings and tracebacks stand around it.

    A full disk is named whatever else the line says; else it is the role's own last word, `error: …`, or the last line
    of a traceback, as Python and torch (`[rank0]: …`) write it.
    """
    if disk_is_full(lines):
        return "the disk is full"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if not errors:
        errors = [match[1] for line in lines if (match := _RAISED.fullmatch(line))]
    return errors[-1].rstrip(". ") if errors else None


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "is running"
    if code >= 0:
        return f"exited with code {code}"
    number = -code
    known = number in {each.value for each in signal.Signals}  # not the real-time ones
    return f"was killed by {signal.Signals(number).name if known else f'signal {number}'}"
