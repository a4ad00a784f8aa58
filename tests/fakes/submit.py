"""`python -m hpc.submit` with fake roles: `FAKE_PLAN='{"rollout": ["serve"], …}' python submit.py FLAGS`."""

import functools
import json
import os
import sys
from pathlib import Path

from hpc import run, submit, supervisor
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


if __name__ == "__main__":
    run.make_plan = lambda args: fake_plan(json.loads(os.environ["FAKE_PLAN"]))
    arguments.check_inputs = lambda args: None
    grace = float(os.environ.get("FAKE_GRACE", "120"))
    supervisor.Supervisor = functools.partial(supervisor.Supervisor, stop_grace=grace, kill_grace=1.0)
    sys.argv += TRAIN_FLAGS
    sys.exit(submit.main())
