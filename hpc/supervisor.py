"""The supervisor: what a job runs. It starts every role, watches them, and leaves none behind.

It is the picklable payload of a submitit job and needs its process's main thread. What one attempt does,
top to bottom, is in `Supervisor.__call__`; the watching is in `hpc/watch.py`.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.eventlog import EventLog, StatusFile
from hpc.launcher import Launcher, LocalLauncher
from hpc.layout import RunLayout
from hpc.lock import hold_lock
from hpc.plan import JobPlan, RoleProcess
from hpc.registry import RegistryServer
from hpc.revive import Revival
from hpc.roles import JobFailedError, RunningRole
from hpc.signals import SignalPipe
from hpc.watch import Outcome, Watch

__all__ = ["JobFailedError", "Supervisor"]

logger = logging.getLogger("slurmlime.supervisor")


@dataclass(frozen=True)
class Supervisor:
    """Run one attempt of a job: `Supervisor(run_dir, plan)()`."""

    run_dir: Path
    plan: JobPlan
    stop_grace: float = 120.0  # seconds for the trainer to save and exit after a stop was asked for
    kill_grace: float = 5.0  # seconds from SIGTERM to SIGKILL
    max_engine_restarts: int = 3  # of each engine, and of the router, within the attempt

    def __call__(self) -> dict[str, Any]:
        """Run until the trainers are done, one role dies, or a signal asks to stop.

        Returns:
            `state` ("finished" or "stopped"), `reason`, `saved`, `signal`, `attempt`, `seconds`.

        Raises:
            JobFailedError: a role died; the message has its exit code, log path and last lines.
            UserError: the run belongs to a job that is running.
        """
        layout = RunLayout(self.run_dir)
        signals = SignalPipe(signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
        with hold_lock(layout), signals:
            attempt = _begin_attempt(layout)
            events = EventLog(layout.events, attempt)
            status = StatusFile(layout.status, attempt)
            with (
                _log_file(layout.log_dir(attempt) / "supervisor.log"),
                _report(events, status, attempt) as report,
            ):
                outcome = self._run(layout, attempt, events, status, signals)
                report.update(vars(outcome))
            return report

    def _run(
        self, layout: RunLayout, attempt: int, events: EventLog, status: StatusFile, signals: SignalPipe
    ) -> Outcome:
        token = secrets.token_urlsafe(32)
        registry = RegistryServer(token, events, status, self._host())
        launcher = self._launcher()
        roles: list[RunningRole] = []
        try:
            env = {
                **_inherited_env(),
                "PYTHONUNBUFFERED": "1",
                "SLURMLIME_RUN_DIR": str(self.run_dir),
                "SLURMLIME_ATTEMPT": str(attempt),
                "SLURMLIME_REGISTRY": registry.url,
                "SLURMLIME_TOKEN": token,
            }
            log_dir = layout.log_dir(attempt)
            start = functools.partial(_start, launcher, env, log_dir, events)
            for process in self.plan.processes:
                roles.append(start(process, {}))
            canary = launcher.start_canary(env, log_dir)
            revival = Revival(start, registry, self.max_engine_restarts)
            watch = Watch(roles, revival, registry, events, status, signals, self.stop_grace, canary)
            return watch.until_over()
        finally:
            self._stop_all(roles, launcher)
            registry.close()

    def _launcher(self) -> Launcher:
        return LocalLauncher()

    def _host(self) -> str:
        """The address on which roles reach this process."""
        return "127.0.0.1"

    def _stop_all(self, roles: list[RunningRole], launcher: Launcher) -> None:
        for role in roles:
            role.handle.terminate()
        # With a node gone Slurm ends the job too, and there may be little time to write down why.
        grace = 0.0 if any(role.handle.lost_a_node() for role in roles) else self.kill_grace
        deadline = time.monotonic() + grace
        while any(role.handle.poll() is None for role in roles) and time.monotonic() < deadline:
            time.sleep(0.02)
        for role in roles:
            role.handle.kill()
        if left := launcher.close():
            logger.error("these processes could not be ended: %s", left)
        for role in roles:
            logger.info("%s ended with %s", role.process.name, role.handle.poll())


def _start(
    launcher: Launcher,
    env: Mapping[str, str],
    log_dir: Path,
    events: EventLog,
    process: RoleProcess,
    more: Mapping[str, str],
) -> RunningRole:
    """Start a role with `more` variables than all have."""
    own = {"SLURMLIME_ROLE": process.role, "SLURMLIME_INDEX": str(process.index)}
    handle = launcher.start(process, {**env, **own, **more}, log_dir)
    logger.info("started %s, process %d: %s", process.name, handle.pid, " ".join(process.argv))
    for name in process.names[:1] if process.spans else process.names:
        fields = {"role": process.role, "index": process.index_of(name), "pid": handle.pid}
        restarts = {"restarts": int(more["SLURMLIME_RESTARTS"])} if "SLURMLIME_RESTARTS" in more else {}
        events.append("role_started", {**fields, **restarts, "log": str(log_dir / f"{name}.log")})
    return RunningRole(process, handle)


def _begin_attempt(layout: RunLayout) -> int:
    """Number the attempt, make its log directory and let `logs/latest` point there."""
    attempt = max(layout.attempts(), default=-1) + 1
    layout.log_dir(attempt).mkdir(parents=True)
    link = layout.latest_logs.with_name(".latest")
    link.unlink(missing_ok=True)
    link.symlink_to(layout.log_dir(attempt).name)
    link.replace(layout.latest_logs)
    return attempt


@contextmanager
def _report(events: EventLog, status: StatusFile, attempt: int) -> Iterator[dict[str, Any]]:
    """Record the start and, from what the block puts into the yielded dict, the end of the attempt."""
    begun = time.time()
    report: dict[str, Any] = {"attempt": attempt}
    events.append("attempt_started", {"host": os.uname().nodename, "pid": os.getpid()})
    status.update({"phase": "starting"})
    try:
        yield report
    except BaseException as error:
        logger.error("%s", error)
        never = {"never_restart": True} if getattr(error, "never_restart", False) else {}
        _finish(events, status, "failed", f"{error}" or type(error).__name__, exit_code=1, **never)
        raise
    report["seconds"] = time.time() - begun
    _finish(events, status, report["state"], report["reason"], exit_code=0)


def _finish(
    events: EventLog, status: StatusFile, state: str, reason: str, exit_code: int, **more: object
) -> None:
    events.append("attempt_finished", {"state": state, "exit_code": exit_code, "reason": reason, **more})
    status.update({"phase": state})


def _inherited_env() -> dict[str, str]:
    """This process's environment without submitit's own variables, which would mislead a nested submitit."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SUBMITIT_")}


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
