"""Watch the roles of a job until it is over: finished, stopped on request, or failed."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import dataclass
from typing import Literal

from hpc.eventlog import EventLog, StatusFile
from hpc.launcher import Handle
from hpc.plan import MAIN_ROLE
from hpc.registry import RegistryServer
from hpc.revive import Revival
from hpc.roles import EXIT_REQUEUE, RunningRole, describe_exit, failure, is_death
from hpc.signals import SignalPipe

_NOTHING_TO_SAVE = ("starting", "loading")  # phases
# A rank may need a moment to exit after the others have; one that hangs there has nothing left to do.
_STRAGGLER_SECONDS = 30.0
# One of many tasks of a step may die without a SIGCHLD.
_POLL_SECONDS = 1.0

logger = logging.getLogger("slurmlime.supervisor")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended without a failure."""

    state: Literal["finished", "stopped"]
    reason: str
    saved: bool
    signal: str | None = None  # that asked to stop


class Watch:
    """Waits for exits and signals; starts no process but engines that died."""

    def __init__(
        self,
        roles: list[RunningRole],
        revival: Revival,
        registry: RegistryServer,
        events: EventLog,
        status: StatusFile,
        signals: SignalPipe,
        stop_grace: float,
        canary: Handle | None = None,
    ) -> None:
        self._roles, self._revival, self._canary = roles, revival, canary
        self._registry, self._events, self._status, self._signals = registry, events, status, signals
        self._stop_grace = stop_grace
        self._stop_reason: str | None = None
        self._stop_signal: str | None = None
        self._deadline = float("inf")
        self._interrupts = 0
        self._reported: set[RunningRole] = set()

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
            raise failure(trainers)
        if outcome := self._verdict([code for role, code in codes.items() if role.process.role == MAIN_ROLE]):
            return outcome
        if self._stop_reason is None:  # while stopping, a trainer may save although an engine is gone
            self._revive(dead)
        return None

    def _revive(self, dead: list[RunningRole]) -> None:
        """Start again what may be; the death of any other role is the end.

        Raises:
            JobFailedError: that of one has come.
        """
        lost = [role for role in dead if not self._revival.takes(role, role.handle.poll() or 0)]
        if lost:
            raise failure(lost, self._revival.count(lost[0].process))
        for old, new in self._revival.start_due().items():
            self._roles[self._roles.index(old)] = new

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
        if role in self._reported:
            return
        self._reported.add(role)
        logger.error("%s %s", role.failed, describe_exit(code))
        who = {"role": role.process.role, "index": role.process.index_of(role.failed)}
        self._events.append("role_died", {**who, "exit_code": code, "log": str(role.handle.failed_log())})
