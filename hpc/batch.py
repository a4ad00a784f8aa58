"""`python -m hpc.batch FOLDER`: the command of a batch script. It is submitit's job, with an exit code for other jobs.

The job is a child of the batch process (`hpc.keeper`), so that somebody can requeue it when it is killed. A run that
was stopped returns its report like a run that is finished. But a job that waits for it to end well (`--after`) must
not start.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from hpc.keeper import ChildEnd, keep
from hpc.signals import hold_warning, release_warning
from rltrain.run.errors import EXIT_REQUEUE, UserError
from rltrain.run.files import own_file

_WRITTEN_SECONDS = 60.0
_BY_SIGNAL = 128  # plus its number: as shells say it

# Modules that the pickled supervisor of an earlier version names, and where their classes are now. Slurm may requeue a
# job long after it was submitted, and `--chain` has jobs that wait. The oldest version that is listed: 0.1.
MOVED_MODULES = {
    "hpc.plan": "hpc.planning.processes",
    "hpc.restart": "hpc.supervisor.restart",
    "hpc.slurm_supervisor": "hpc.supervisor.slurm_supervisor",
}


def accept_moved_modules() -> None:
    """Let `pickle` find the classes of earlier versions under the names that they had."""
    for before, now in MOVED_MODULES.items():
        sys.modules[before] = importlib.import_module(now)


def exit_code(result: Any) -> int:
    """Exit code of a job that returned `result`: 75 for a supervisor's report that its run was stopped, else 0."""
    stopped = isinstance(result, dict) and result.get("state") == "stopped"
    return EXIT_REQUEUE if stopped else 0


def check_own(pickled: Path) -> None:
    """Check that nobody else can have written the job, whose file may appear only after it has begun.

    Raises:
        UserError: somebody may have.
    """
    deadline = time.monotonic() + _WRITTEN_SECONDS
    while not pickled.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if pickled.exists():  # else submitit says so
        own_file(pickled)


def after_kill(pickled: Path, ended: ChildEnd) -> int:
    """What follows for a job that a signal has ended; returns the exit code."""
    from submitit.core.utils import DelayedSubmission

    accept_moved_modules()
    job = DelayedSubmission.load(own_file(pickled)).function
    # A person's SIGINT may come before the supervisor looks for it, or after its attempt: it still means no other.
    interrupted = ended.interrupted or signal.SIGINT in signal.sigpending()
    number = signal.SIGINT if interrupted else -ended.code
    is_done = hasattr(job, "after_kill") and job.after_kill(number, ended.for_memory, ended.begun)
    return 0 if is_done else _BY_SIGNAL - ended.code


def _takes_warnings(pickled: Path) -> bool:
    """Whether the job is a supervisor; of other functions submitit takes the warning of the time limit."""
    from submitit.core.utils import pickle_load

    try:
        return getattr(pickle_load(pickled).function, "takes_warnings", False)
    except Exception:  # submitit writes down what is wrong with it
        return False


def _release_warning_in_time() -> None:
    """Let the warning of the time limit come when submitit has its handler for it: just before the function begins."""
    from submitit.core.utils import DelayedSubmission

    whole = DelayedSubmission.result

    def result(submission: DelayedSubmission) -> Any:
        release_warning()
        return whole(submission)

    setattr(DelayedSubmission, "result", result)  # noqa: B010 – mypy lets nobody assign to a method


def main() -> NoReturn:
    """Run the job."""
    hold_warning()
    ended = keep()
    if ended is not None and not ended.was_killed:
        sys.exit(ended.code)
    from submitit.core.job_environment import JobEnvironment  # these take seconds on a busy disk
    from submitit.core.submission import process_job
    from submitit.core.utils import pickle_load

    os.environ["SUBMITIT_FOLDER"] = sys.argv[1]  # as submitit sets it, too late for us
    paths = JobEnvironment().paths
    if ended is not None:
        sys.exit(after_kill(paths.submitted_pickle, ended))
    accept_moved_modules()
    try:
        check_own(paths.submitted_pickle)
    except UserError as error:
        sys.exit(f"error: {error}")
    if not _takes_warnings(paths.submitted_pickle):
        _release_warning_in_time()
    process_job(sys.argv[1])
    outcome, result = pickle_load(own_file(paths.result_pickle))
    sys.exit(exit_code(result) if outcome == "success" else 1)


if __name__ == "__main__":
    main()
