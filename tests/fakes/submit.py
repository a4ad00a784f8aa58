"""`python -m hpc.submit` with fake roles: `FAKE_PLAN='{"rollout": ["serve"], …}' python submit.py FLAGS`."""

import functools
import json
import os
import sys
from pathlib import Path

from hpc import plan, run, submit, supervisor
from hpc.plan import JobPlan, RoleProcess
from rltrain import arguments

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
    run.make_plan = lambda args: fake_plan(json.loads(os.environ["FAKE_PLAN"]))
    plan._argv = fake_argv
    arguments.check_inputs = lambda args, to_come=None: None
    grace = float(os.environ.get("FAKE_GRACE", "120"))
    if not any(word.startswith("--partition") for word in sys.argv):  # the batch job has not imported this
        supervisor.Supervisor = functools.partial(supervisor.Supervisor, stop_grace=grace, kill_grace=1.0)
    sys.argv += TRAIN_FLAGS
    sys.exit(submit.main())
