"""A tracker with W&B offline, without a job around it."""

from pathlib import Path

from rltrain.arguments.config import Config
from rltrain.run.layout import RunLayout
from rltrain.tracking import Tracker


def make_tracker(run_dir: str, attempt: int) -> Tracker:
    return Tracker(Config().replace(wandb_mode="offline"), RunLayout(Path(run_dir)), attempt)
