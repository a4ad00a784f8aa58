"""A tracker with W&B offline, without a job around it."""

from argparse import Namespace
from pathlib import Path

from hpc.layout import RunLayout
from rltrain import tracking
from rltrain.tracking import Tracker


def make_tracker(run_dir: str, attempt: int) -> Tracker:
    tracking.dump = lambda args: {}  # there are no other flags
    names = ("project", "team", "group", "run_id", "dir")
    args = Namespace(wandb_mode="offline", use_wandb=False, **{f"wandb_{name}": None for name in names})
    return Tracker(args, RunLayout(Path(run_dir)), attempt)
