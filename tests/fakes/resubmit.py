"""`python -m hpc.resubmit` with fake roles, as `submit.py` in this folder."""

import json
import os
import sys

from submit import fake_argv, fake_plan

from hpc import cli, resubmit
from hpc.planning import job_plan
from hpc.submitting import start_run
from rltrain import inputs

if __name__ == "__main__":
    start_run.make_plan = lambda args, **_: fake_plan(json.loads(os.environ["FAKE_PLAN"]))
    job_plan._argv = fake_argv
    inputs.check_inputs = lambda args, to_come=None: args
    sys.exit(cli.run_main(resubmit.main))
