"""`python -m hpc.batch FOLDER`: what a batch script runs. It is submitit's job, with an exit code for other jobs.

A run that was stopped has returned its report like one that is finished; but a job that waits for it to end well
(`--after`) must not start.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from submitit.core.job_environment import JobEnvironment
from submitit.core.submission import process_job
from submitit.core.utils import pickle_load

from hpc.roles import EXIT_REQUEUE


def exit_code(result: Any) -> int:
    """Of a job that returned `result`: 75 for a supervisor's report that its run was stopped, else 0."""
    stopped = isinstance(result, dict) and result.get("state") == "stopped"
    return EXIT_REQUEUE if stopped else 0


def main() -> NoReturn:
    """Run the job."""
    process_job(sys.argv[1])
    outcome, result = pickle_load(JobEnvironment().paths.result_pickle)
    sys.exit(exit_code(result) if outcome == "success" else 1)


if __name__ == "__main__":
    main()
