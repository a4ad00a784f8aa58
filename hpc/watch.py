"""Watch the roles of a job until it is over: finished, stopped on request, or failed."""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc.eventlog import EventLog, StatusFile
from hpc.launcher import Handle
from hpc.plan import MAIN_ROLE, RoleProcess
from hpc.registry import RegistryServer
from hpc.signals import SignalPipe

# Exit codes of roles.
EXIT_REQUEUE = 75  # saved, wants to run again
EXIT_NEVER_RESTART = 93  # running again would fail the same way
LAST_LINES = 20

_NOTHING_TO_SAVE = ("starting", "loading")  # phases
# A rank may need a moment to exit after the others have; one that hangs there has nothing left to do.
_STRAGGLER_SECONDS = 30.0
# One of many tasks of a step may die without a SIGCHLD.
_POLL_SECONDS = 1.0

logger = logging.getLogger("slurmlime.supervisor")


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


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended without a failure."""

    state: Literal["finished", "stopped"]
    reason: str
    saved: bool
    signal: str | None = None  # that asked to stop


class Watch:
    """Waits for exits and signals; neither starts nor ends a process."""

    def __init__(
        self,
        roles: list[RunningRole],
        registry: RegistryServer,
        events: EventLog,
        status: StatusFile,
        signals: SignalPipe,
        stop_grace: float,
        canary: Handle | None = None,
    ) -> None:
        self._roles, self._canary = roles, canary
        self._registry, self._events, self._status, self._signals = registry, events, status, signals
        self._stop_grace = stop_grace
        self._stop_reason: str | None = None
        self._stop_signal: str | None = None
        self._deadline = float("inf")
        self._interrupts = 0
        self._reported: set[str] = set()

    def until_over(self) -> Outcome:
        """Wait until the attempt is over.

        Raises:
            JobFailedError: a role died that should not have.
        """
        while True:
            for number in self._signals.wait(min(_POLL_SECONDS, self._deadline - time.monotonic())):
                self._on_signal(number)
            self._ask_canary()
            if outcome := self._check_exits():
                return outcome

    def _ask_canary(self) -> None:
        """A step that only dies of the signals that Slurm sends to steps and not to us."""
        code = self._canary.poll() if self._canary and self._stop_reason is None else None
        if code in (-signal.SIGTERM, -signal.SIGUSR2):
            self._on_signal(signal.Signals(-code))

    def _on_signal(self, number: signal.Signals) -> None:
        logger.info("got %s", number.name)
        self._interrupts += number == signal.SIGINT
        if self._stop_reason is None:
            self._stop_reason, self._stop_signal = f"{number.name} received", number.name
            self._deadline = time.monotonic() + self._stop_grace
            if self._status.get("phase") in _NOTHING_TO_SAVE:
                self._deadline = 0.0
            self._registry.request_stop(self._stop_reason)
            self._events.append("stop_requested", {"reason": self._stop_reason})
            self._status.update({"phase": "stopping"})
        elif self._interrupts > 1:  # only a person sends a second one
            self._deadline = 0.0

    def _check_exits(self) -> Outcome | None:
        codes = {role: role.handle.poll() for role in self._roles}
        dead = [role for role, code in codes.items() if code is not None and is_death(role.process, code)]
        for role in dead:
            self._report_death(role, codes[role])
        if trainers := [role for role in dead if role.process.role == MAIN_ROLE]:
            raise _failure(trainers)
        if outcome := self._verdict([code for role, code in codes.items() if role.process.role == MAIN_ROLE]):
            return outcome
        if (
            dead and self._stop_reason is None
        ):  # while stopping, a trainer may save although an engine is gone
            raise _failure(dead)
        return None

    def _verdict(self, main: list[int | None]) -> Outcome | None:
        over = [code for code in main if code is not None]
        if len(over) < len(main):
            if over:
                self._deadline = min(self._deadline, time.monotonic() + _STRAGGLER_SECONDS)
            if time.monotonic() < self._deadline:
                return None
        if EXIT_REQUEUE in over:
            reason = self._stop_reason or f"{MAIN_ROLE} asked to be run again"
            return Outcome("stopped", reason, saved=True, signal=self._stop_signal)
        if over:
            return Outcome("finished", "all steps are done", saved=True)
        return Outcome("stopped", self._stop_reason or "", saved=False, signal=self._stop_signal)

    def _report_death(self, role: RunningRole, code: int | None) -> None:
        if role.process.name in self._reported:
            return
        self._reported.add(role.process.name)
        logger.error("%s %s", role.failed, describe_exit(code))
        names = role.process.names
        index = role.process.index + (names.index(role.failed) if role.failed in names else 0)
        who = {"role": role.process.role, "index": index}
        self._events.append("role_died", {**who, "exit_code": code, "log": str(role.handle.failed_log())})


def is_death(process: RoleProcess, code: int) -> bool:
    """Whether an exit code is bad news: only a trainer may end by itself, done or saved."""
    return process.role != MAIN_ROLE or code not in (0, EXIT_REQUEUE)


def _failure(dead: list[RunningRole]) -> JobFailedError:
    never = any(role.handle.poll() == EXIT_NEVER_RESTART for role in dead)
    return JobFailedError(describe_deaths(dead), never)


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
