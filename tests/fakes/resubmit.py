"""`python -m hpc.resubmit` with fake roles, as `submit.py` in this folder."""

import json
import os
import sys

from submit import fake_argv, fake_plan

from hpc import cli, plan, resubmit, run
from rltrain import arguments

if __name__ == "__main__":
    run.make_plan = lambda args: fake_plan(json.loads(os.environ["FAKE_PLAN"]))
    plan._argv = fake_argv
    arguments.check_inputs = lambda args, to_come=None: None
    sys.exit(cli.run_main(resubmit.main))
