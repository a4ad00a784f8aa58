"""Watch the roles of a job until it is over: finished, stopped on request, or failed.

It is finished only when the trainer has proven so (`rltrain.run.finished`): an exit code of 0 proves nothing.

Engines and routers that died are restarted one by one: a bounded number of times, with growing delays. So is any role
that Slurm refused to start. The router
sends what such an engine was generating to the others, or keeps it for the new one. A new engine takes the current
weights before its first request (`rltrain/sglang/engine.py`). A new router takes the port of the one before.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hpc.planning.processes import MAIN_ROLE, RoleProcess
from hpc.signals import SignalPipe
from hpc.supervisor.causes import Cause
from hpc.supervisor.launcher import Handle
from hpc.supervisor.registry import RegistryServer
from hpc.supervisor.roles import RunningRole, describe_exit, failure, is_death, unproven_end
from rltrain.run.errors import EXIT_NEVER_RESTART, EXIT_REQUEUE
from rltrain.run.files import EventLog, StatusFile

_NOTHING_TO_SAVE = ("starting", "loading")  # phases
# A rank may need a moment to exit after the others have; one that hangs there has nothing left to do.
_STRAGGLER_SECONDS = 30.0
# One of many tasks of a step may die without a SIGCHLD.
_POLL_SECONDS = 1.0

# After the proof, for the last metrics to be sent.
_FLUSH_SECONDS = 300.0

REVIVED = ("engine", "router")
_FIRST_DELAY = 1.0  # seconds; doubled each time
_MAX_REFUSALS = 6  # of Slurm to start a role, before the attempt ends: about a minute

logger = logging.getLogger("slurmlime.supervisor")

Starter = Callable[[RoleProcess, Mapping[str, str]], RunningRole]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended without a failure."""

    state: Literal["finished", "stopped"]
    reason: str
    saved: bool
    signal: str | None = None  # that asked to stop


class Revival:
    """Decides which dead roles are started again, and when."""

    def __init__(self, start: Starter, registry: RegistryServer, limit: int) -> None:
        """Start with `start`, each at most `limit` times in the attempt."""
        self._start, self._registry, self._limit = start, registry, limit
        self._counts: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._urls: dict[str, str] = {}
        self._due: dict[RunningRole, float] = {}

    def takes(self, role: RunningRole, code: int) -> bool:
        """True if a dead role will be started again.

        A role that failed before it was ever ready is not: it would fail in the same way. One that Slurm refused to
        start, or that was killed from outside, is.
        """
        if role in self._due:
            return True
        name, end = role.process.name, role.handle.end()
        if end.is_refused:
            return self._takes_refused(role)
        if role.process.role not in REVIVED or code == EXIT_NEVER_RESTART or role.handle.lost_a_node():
            return False
        url = self._registry.url_of(role.process.role, role.process.index) or self._urls.get(name)
        if (url is None and end.cause is Cause.CODE) or self._counts[name] >= self._limit:
            return False
        if role.process.role == "engine":  # a router is looked for where it was
            self._registry.forget(role.process.role, role.process.index)
        role.handle.terminate()  # an engine that spans nodes may have died on one of them only
        if url is not None:
            self._urls[name] = url
        self._due[role] = time.monotonic() + _FIRST_DELAY * 2 ** self._counts[name]
        self._counts[name] += 1
        return True

    def _takes_refused(self, role: RunningRole) -> bool:
        name = role.process.name
        if self._refusals[name] >= _MAX_REFUSALS:
            return False
        self._due[role] = time.monotonic() + _FIRST_DELAY * 2 ** self._refusals[name]
        self._refusals[name] += 1
        logger.warning("%s: %s; it is tried again", name, role.handle.end().reason)
        return True

    def count(self, process: RoleProcess) -> int:
        """How often it has been started again."""
        return self._counts[process.name]

    def start_due(self) -> dict[RunningRole, RunningRole]:
        """Start those whose time has come; returns each by the one that it replaces."""
        started = {}
        for role in [role for role, due in self._due.items() if due <= time.monotonic()]:
            if not role.handle.has_ended():
                role.handle.kill()
                continue
            del self._due[role]
            name = role.process.name
            env = {"SLURMLIME_RESTARTS": str(self._counts[name])} if self._counts[name] else {}
            if name in self._urls:
                env["SLURMLIME_REPLACES"] = self._urls[name]
            started[role] = self._start(role.process, env)
        return started


class Watch:
    """Waits for exits and signals; starts no process but what died and is started again."""

    def __init__(
        self,
        roles: list[RunningRole],
        revival: Revival,
        registry: RegistryServer,
        events: EventLog,
        status: StatusFile,
        signals: SignalPipe,
        stop_grace: float,
        start_canary: Callable[[], Handle | None],
    ) -> None:
        self._roles, self._revival = roles, revival
        self._start_canary, self._canary = start_canary, start_canary()
        self._canary_ends = 0
        self._canary_due = float("inf")
        self._registry, self._events, self._status, self._signals = registry, events, status, signals
        self._stop_grace = stop_grace
        self._stop_reason: str | None = None
        self._stop_signal: str | None = None
        self._deadline = float("inf")
        self._interrupts = 0
        self._is_flushing = False
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
        """A step that only dies of the signals that Slurm sends to steps and not to us.

        One that Slurm did not start, or that ended otherwise, is started again: without it those signals would be
        missed.
        """
        if self._stop_reason is not None:
            return
        if self._canary_due <= time.monotonic():
            self._canary, self._canary_due = self._start_canary(), float("inf")
        code = self._canary.poll() if self._canary else None
        if self._canary is None or code is None:
            return
        end = self._canary.end()
        # srun ends with numbers of Slurm's errors, too, some of which look like a signal.
        if end.cause is not Cause.CLUSTER and code in (-signal.SIGTERM, -signal.SIGUSR2):
            self._on_signal(signal.Signals(-code))
        elif self._canary_ends < _MAX_REFUSALS:
            logger.warning("the canary %s %s; it is started again", describe_exit(code), end.reason)
            self._canary = None
            self._canary_due = time.monotonic() + _FIRST_DELAY * 2**self._canary_ends
            self._canary_ends += 1

    def _on_signal(self, number: signal.Signals) -> None:
        self._interrupts += number == signal.SIGINT
        if self._stop_reason is None:
            self._stop_reason, self._stop_signal = f"{number.name} received", number.name
            self._registry.request_stop(self._stop_reason)  # before anything that may wait for a disk
            self._deadline = time.monotonic() + self._stop_grace
            if self._status.get("phase") in _NOTHING_TO_SAVE:
                self._deadline = 0.0
            logger.info("got %s", number.name)
            self._events.append("stop_requested", {"reason": self._stop_reason})
            self._status.update({"phase": "stopping"})
        elif self._interrupts > 1:  # only a person sends a second one
            self._deadline = 0.0

    def _check_exits(self) -> Outcome | None:
        codes = {role: role.handle.poll() for role in self._roles}
        trainers = [role for role in self._roles if role.process.role == MAIN_ROLE]
        if self._registry.is_finished:
            return self._when_finished([codes[role] for role in trainers])
        dead = [role for role, code in codes.items() if code is not None and is_death(role.process, code)]
        for role in dead:
            self._report_death(role, codes[role])
        lost = self._not_revived(dead)
        if lost_trainers := [role for role in lost if role in trainers]:
            raise failure(lost_trainers)
        gone = [role for role in dead if role not in lost]
        if outcome := self._verdict(trainers, [None if role in gone else codes[role] for role in trainers]):
            return outcome
        if self._stop_reason is None:  # while stopping, a trainer may save although an engine is gone
            if lost:
                raise failure(lost, self._revival.count(lost[0].process))
            for old, new in self._revival.start_due().items():
                self._roles[self._roles.index(old)] = new
        return None

    def _not_revived(self, dead: list[RunningRole]) -> list[RunningRole]:
        """Of the dead roles those that will not be started again."""
        if self._stop_reason is not None:
            return dead
        return [role for role in dead if not self._revival.takes(role, role.handle.poll() or 0)]

    def _when_finished(self, main: list[int | None]) -> Outcome | None:
        """All is done and proven: however the roles end now, the run is finished."""
        if not self._is_flushing:
            self._is_flushing = True
            self._deadline = min(self._deadline, time.monotonic() + _FLUSH_SECONDS)
        if None in main and time.monotonic() < self._deadline:
            return None
        return Outcome("finished", "all steps are done", saved=True)

    def _verdict(self, trainers: list[RunningRole], main: list[int | None]) -> Outcome | None:
        """How the attempt ended by the trainers' exit codes, where the end of training is not proven.

        Raises:
            JobFailedError: they ended as if they were done.
        """
        over = [code for code in main if code is not None]
        if len(over) < len(main):
            if over:
                self._deadline = min(self._deadline, time.monotonic() + _STRAGGLER_SECONDS)
            if time.monotonic() < self._deadline:
                return None
        if EXIT_REQUEUE in over:
            return self._stopped_itself()
        if over and self._stop_reason is None:
            raise unproven_end(trainers)
        return Outcome("stopped", self._stop_reason or "", saved=False, signal=self._stop_signal)

    def _stopped_itself(self) -> Outcome:
        reason, unsaved = self._stop_reason or f"{MAIN_ROLE} asked to be run again", self._registry.unsaved
        if unsaved is not None:
            reason += f", but its last checkpoint is lost: {unsaved}"
        return Outcome("stopped", reason, saved=unsaved is None, signal=self._stop_signal)

    def _report_death(self, role: RunningRole, code: int | None) -> None:
        if role in self._reported:
            return
        self._reported.add(role)
        logger.error("%s %s", role.failed, describe_exit(code))
        who = {"role": role.process.role, "index": role.process.index_of(role.failed)}
        self._events.append("role_died", {**who, "exit_code": code, "log": str(role.handle.failed_log())})
