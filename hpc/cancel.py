"""Stop a run: it finishes its step, saves and ends, and can be resumed (`python -m hpc.resubmit RUN`).

On Slurm its waiting jobs are cancelled too. `--now` does not wait for a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hpc import cli
from hpc.runs.find import RunRecord, choose_runs, find_run, read_run
from hpc.runs.lock import Holder, find_holder
from hpc.runs.progress import read_status
from hpc.runs.slurm_jobs import SlurmView, ask_slurm, job_state
from hpc.slurm.client import SlurmClient, SlurmError
from hpc.slurm.states import JobState
from hpc.submitting.resuming import has_checkpoint
from rltrain.run.errors import EXIT_USAGE, UserError
from rltrain.run.layout import RunLayout
from rltrain.run.terminal import safe_text

EXAMPLE = "python -m hpc.cancel demo"
EXIT_CODES = "exit codes: 0 the run has been told to stop, 2 it is not running or does not exist"

_NOW_SECONDS = 10.0  # for a supervisor to end its roles before it is killed


def cancel(
    run: str | Path, now: bool = False, runs_dir: str | Path = "runs", client: SlurmClient | None = None
) -> str:
    """Stop a run, at once if `now`; returns a sentence on what has been done.

    Does not wait for the end of an orderly stop.

    Raises:
        UserError: it does not run, it can't be reached from here, or Slurm refused.
    """
    layout = find_run(run, Path(runs_dir))
    record = read_run(layout)
    client = client or SlurmClient()
    slurm = ask_slurm(record.slurm_jobs, client)
    lost = _end_lost_jobs(layout)
    if jobs := active_jobs(record, slurm):
        return _cancel_jobs(layout, jobs, now, client)
    if record.holder is None and lost:
        return f"{layout.name} (job {', '.join(lost)}) was cancelled; its submit had given it up."
    if record.holder is None:
        raise UserError(_explain_idle(record, slurm))
    return _cancel_here(layout, record.holder, now)


def _end_lost_jobs(layout: RunLayout) -> list[str]:
    if not any(layout.submitit.glob("*.lost")):
        return []
    from hpc.submitting.executor import end_lost_jobs  # importing submitit is slow

    with suppress(SlurmError):
        return end_lost_jobs(layout.submitit)
    return []


def active_jobs(record: RunRecord, slurm: SlurmView) -> dict[str, JobState]:
    """The run's Slurm jobs that run or wait, the newest first."""
    states = {job.job_id: job_state(slurm.records.get(job.job_id, ())) for job in reversed(record.slurm_jobs)}
    return {job: state for job, state in states.items() if state is not None and not state.is_final}


def _cancel_jobs(layout: RunLayout, jobs: dict[str, JobState], now: bool, client: SlurmClient) -> str:
    running = [job for job, state in jobs.items() if state is JobState.RUNNING]
    others = [job for job in jobs if now or job not in running]
    # Those that wait first: a spare job would begin when the one before it ends.
    client.cancel(others)
    if now:
        with suppress(SlurmError):  # by now some may have ended
            client.run("scancel", "--signal=KILL", "--full", *jobs)
    elif running:
        # As Ctrl-C does on this machine. scancel itself would leave only KillWait for saving.
        client.run("scancel", "--batch", "--signal=INT", *running)
    who = f"{layout.name} (job{'s' * (len(jobs) > 1)} {', '.join(jobs)})"
    if not running:
        return f"{who} was cancelled before it began. {_resumable(layout)}"
    if now:
        return f"{who} was stopped without saving. {_resumable(layout)}"
    return f"{who} {_asked(layout)}"


def _cancel_here(layout: RunLayout, holder: Holder, now: bool) -> str:
    if not holder.is_here:
        raise UserError(
            f"{layout.name} runs as process {holder.pid} on {holder.host or 'another machine'}, and no Slurm job is"
            " known for it: run this command there."
        )
    try:
        os.kill(holder.pid, signal.SIGTERM)
        if now:
            _stop_now(layout, holder)
            return f"{layout.name} was stopped without saving. {_resumable(layout)}"
    except PermissionError:
        raise UserError(
            f"{layout.name} is run by another user: process {holder.pid} can't be stopped."
        ) from None
    except ProcessLookupError:
        return f"{layout.name} has just ended."
    return f"{layout.name} {_asked(layout)}"


def _stop_now(layout: RunLayout, holder: Holder) -> None:
    """End the supervisor with all its roles: as two Ctrl-C would or, if it does not react, by SIGKILL."""

    def has_ended() -> bool:
        return find_holder(layout) is None

    _until(lambda: has_ended() or read_status(layout).get("phase") == "stopping", _NOW_SECONDS)
    for seconds in (0.5, _NOW_SECONDS):  # the second one means "now"
        if not has_ended():
            os.kill(holder.pid, signal.SIGINT)
        if _until(has_ended, seconds):
            return
    os.kill(holder.pid, signal.SIGKILL)  # its roles die with it
    _until(has_ended, _NOW_SECONDS)


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def _asked(layout: RunLayout) -> str:
    shows = f"`{cli.command('logs', layout, '-f')}` shows the end."
    return f"was asked to stop: it finishes its step and saves. {shows} {_resumable(layout, will_save=True)}"


def _resumable(layout: RunLayout, will_save: bool = False) -> str:
    command = f"`{cli.command('resubmit', layout)}`"
    if will_save or has_checkpoint(layout):
        return f"{command} resumes it from its last checkpoint."
    return f"{command} starts it from the beginning: it has no checkpoint yet."


def _explain_idle(record: RunRecord, slurm: SlurmView) -> str:
    if slurm.problem:
        return f"{record.layout.name} can't be cancelled: {slurm.problem}"
    return f"{record.layout.name} is not running: it is {record.state}."


def main(argv: list[str]) -> int:
    """The command line; returns an exit code."""
    parser = cli.make_parser("hpc.cancel", __doc__, EXAMPLE, EXIT_CODES)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="name, pattern such as 'exp.*', or directory")
    parser.add_argument("--now", action="store_true", help="stop at once, without saving")
    cli.add_runs_dir(parser)
    args = parser.parse_args(argv)
    chosen = choose_runs(args.runs, args.runs_dir)
    code = cli.EXIT_OK
    for layout in chosen:
        try:
            print(cancel(layout.root, args.now))
        except UserError as error:
            if len(chosen) == 1:
                raise
            # Of several, the others are stopped all the same; one that has ended already is not a failure.
            print(safe_text(str(error)), file=sys.stderr)
            code = code if _has_ended(layout) else EXIT_USAGE
    return code


def _has_ended(layout: RunLayout) -> bool:
    return read_run(layout).state in ("finished", "stopped", "failed")


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
