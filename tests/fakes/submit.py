"""`python -m hpc.submit` with fake roles: `FAKE_PLAN='{"rollout": ["serve"], …}' python submit.py FLAGS`."""

import functools
import json
import os
import sys
from pathlib import Path

from hpc import submit
from hpc.planning import job_plan
from hpc.planning.processes import JobPlan, RoleProcess
from hpc.submitting import start_run
from hpc.supervisor import supervisor
from rltrain import inputs

ROLE = str(Path(__file__).with_name("role.py"))
TRAIN_FLAGS = ["--hf-checkpoint=/x", "--prompt-data=/x", "--rollout-batch-size=1"]


def fake_plan(behaviours: dict[str, list[str]]) -> JobPlan:
    """One process for each behaviour of a role."""
    processes = [
        RoleProcess(role, index, (sys.executable, ROLE, behaviour))
        for role, listed in behaviours.items()
        for index, behaviour in enumerate(listed)
    ]
    return JobPlan(tuple(processes))


def fake_argv(role: str, python: str) -> tuple[str, ...]:
    """For a Slurm job: each process takes the behaviour of its index, or the last."""
    return (python, ROLE, ",".join(json.loads(os.environ["FAKE_PLAN"])[role]))


if __name__ == "__main__":
    start_run.make_plan = lambda args, **_: fake_plan(json.loads(os.environ["FAKE_PLAN"]))
    job_plan._argv = fake_argv
    inputs.check_inputs = lambda args, to_come=None: args
    grace = float(os.environ.get("FAKE_GRACE", "120"))
    if not any(word.startswith("--partition") for word in sys.argv):  # the batch job has not imported this
        supervisor.Supervisor = functools.partial(supervisor.Supervisor, stop_grace=grace, kill_grace=1.0)
    sys.argv += TRAIN_FLAGS
    sys.exit(submit.main())
