"""The supervisor, the program of a job. It starts every role, watches them, and leaves none behind.

It is the picklable payload of a submitit job and needs its process's main thread. What one attempt does,
top to bottom, is in `Supervisor.__call__`; the watching is in `hpc/supervisor/watch.py`.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.planning.processes import JobPlan, RoleProcess
from hpc.runs.lock import hold_lock
from hpc.signals import SignalPipe
from hpc.supervisor.causes import Cause
from hpc.supervisor.launcher import Launcher, LocalLauncher
from hpc.supervisor.registry import RegistryServer
from hpc.supervisor.roles import JobFailedError, RunningRole
from hpc.supervisor.watch import Outcome, Revival, Watch
from rltrain.run.files import EventLog, StatusFile, replace_link, share_like
from rltrain.run.layout import RunLayout

__all__ = ["BALLAST", "JobFailedError", "Supervisor"]

logger = logging.getLogger("slurmlime.supervisor")

BALLAST = ".ballast"  # in the attempt's log directory: makes room for its end on a disk that is full by then
_BALLAST_BYTES = 64 * 1024


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
        share_like(layout.root)
        signals = SignalPipe(signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
        with hold_lock(layout), signals:
            attempt = _begin_attempt(layout)
            events = EventLog(layout.events, attempt)
            status = StatusFile(layout.status, attempt)
            with (
                _log_file(layout.log_dir(attempt) / "supervisor.log"),
                _report(events, status, attempt, layout.log_dir(attempt) / BALLAST, self.plan) as report,
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
            revival = Revival(start, registry, self.max_engine_restarts)
            start_canary = functools.partial(launcher.start_canary, env, log_dir)
            watch = Watch(roles, revival, registry, events, status, signals, self.stop_grace, start_canary)
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
        # If a node is gone Slurm ends the job too, and there may be little time to record the reason.
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
    shutil.copyfile(layout.config, layout.log_dir(attempt) / "config.toml")  # the run's may change
    replace_link(layout.latest_logs, layout.log_dir(attempt).name)
    return attempt


@contextmanager
def _report(
    events: EventLog, status: StatusFile, attempt: int, ballast: Path, plan: JobPlan
) -> Iterator[dict[str, Any]]:
    """Record the start and, from what the block puts into the yielded dict, the end of the attempt.

    `ballast` is a file that makes room for that on a disk that is full by then.
    """
    begun = time.monotonic()  # the clock may jump
    report: dict[str, Any] = {"attempt": attempt}
    with suppress(OSError):
        ballast.write_bytes(os.urandom(_BALLAST_BYTES))
    events.append("attempt_started", {"host": os.uname().nodename, "pid": os.getpid(), "gpus": plan.gpus})
    status.update({"phase": "starting"})
    try:
        yield report
    except BaseException as error:
        logger.error("%s", error)
        ballast.unlink(missing_ok=True)
        more: dict[str, object] = {"cause": cause_of(error)}
        if isinstance(error, JobFailedError) and error.never_restart:
            more["never_restart"] = True
        _finish(events, status, "failed", f"{error}" or type(error).__name__, exit_code=1, **more)
        raise
    ballast.unlink(missing_ok=True)
    report["seconds"] = time.monotonic() - begun
    _finish(events, status, report["state"], report["reason"], exit_code=0)


def cause_of(error: BaseException) -> Cause:
    """Whose failure an error that ended an attempt is."""
    if isinstance(error, JobFailedError):
        return error.cause
    return Cause.UNKNOWN if isinstance(error, OSError) else Cause.CODE


def _finish(
    events: EventLog, status: StatusFile, state: str, reason: str, exit_code: int, **more: object
) -> None:
    for write in (
        lambda: events.append(
            "attempt_finished", {"state": state, "exit_code": exit_code, "reason": reason, **more}
        ),
        lambda: status.update({"phase": state}),
    ):
        try:
            write()
        except OSError as error:  # the reason of the end must not be lost over this one
            print(f"the end of the attempt could not be recorded: {error}", file=sys.stderr, flush=True)


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
