"""Run a job on this machine through submitit, in the foreground of `submit`."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import JobPaths, pickle_load
from submitit.local.local import LocalJob

from hpc.signals import SignalPipe
from hpc.supervisor.supervisor import Supervisor
from rltrain.run import processes
from rltrain.run.files import own_file

_REFRESH_SECONDS = 0.25


class LocalExecutor(submitit.LocalExecutor):
    """submitit's LocalExecutor with the job as a direct child in a session of its own.

    submitit's controller between the two ends a job after a timeout, and one second after Ctrl-C; a run
    has to save first. The job gets SIGTERM, which the supervisor takes as "save and stop", when this process
    dies. Submit from a thread that lives as long as the process.
    """

    def _submit_command(self, command: str) -> LocalJob[Any]:
        job_id = secrets.token_hex(4)
        paths = JobPaths(self.folder, job_id, 0)
        env = os.environ | {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": job_id,
            "SUBMITIT_LOCAL_NTASKS": "1",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_GLOBALID": "0",
            "SUBMITIT_LOCAL_LOCALID": "0",
        }
        with paths.stdout.open("ab") as stdout, paths.stderr.open("ab") as stderr:
            process = subprocess.Popen(
                shlex.split(command),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=processes.dying_with_us(signal.SIGTERM),
            )
        return LocalJob(folder=self.folder, job_id=job_id, tasks=[0], process=process)


@dataclass(frozen=True)
class LocalResult:
    """The end of a local job: the supervisor's report, or the reason of a failure.

    Neither, if it was interrupted before it had begun.
    """

    report: dict[str, Any] | None = None
    error: str | None = None


def run(
    supervisor: Supervisor, folder: Path, refresh: Callable[[], None], on_stop: Callable[[bool], None]
) -> LocalResult:
    """Run a job to its end; `refresh` is called a few times a second meanwhile.

    The first Ctrl-C (or SIGTERM, or a closed terminal) is passed on as "save and stop", the next one as "stop
    now"; `on_stop` is told which of the two. Nothing that the job started is left when this returns.
    """
    processes.become_subreaper()  # if the supervisor is killed, we end what it leaves behind
    interrupted = False
    with SignalPipe(*_wanted_signals()) as signals:
        job = LocalExecutor(folder).submit(supervisor)
        try:
            while not job.done():
                for _ in signals.wait(_REFRESH_SECONDS):
                    on_stop(interrupted)
                    interrupted = True
                    job.cancel()  # SIGINT to the supervisor
                refresh()
        finally:
            processes.kill_descendants(os.getpid())
        refresh()
    return _result(job, interrupted)


def _wanted_signals() -> list[signal.Signals]:
    """Those that ask to stop, but for what the shell has us ignore (nohup, a script's background job)."""
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in stops if signal.getsignal(number) is not signal.SIG_IGN]


def _result(job: LocalJob[Any], interrupted: bool) -> LocalResult:
    if not job.paths.result_pickle.exists():
        lost = f"the supervisor ended without a result. Its output is in {job.paths.stderr}."
        return LocalResult(error=None if interrupted else lost)
    outcome, value = pickle_load(own_file(job.paths.result_pickle))
    return LocalResult(report=value) if outcome == "success" else LocalResult(error=readable_error(value))


def readable_error(text: str) -> str:
    """The message in a traceback that submitit brought back, for errors that are meant for people."""
    for kind in ("JobFailedError", "UserError"):
        _, found, message = text.rpartition(f".{kind}: ")
        if found:
            return message.strip()
    return text.strip()
