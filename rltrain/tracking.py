"""Where metrics go: one line a step in `metrics.jsonl` and the same numbers in W&B.

Only trainer rank 0 writes. W&B gets its own step axis instead of `step=`, because it drops rows whose step
it has seen before, which is every row that is repeated after a restart.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

from hpc.layout import RunLayout
from rltrain.arguments import dump


class Tracker:
    """Writes metrics of one attempt."""

    def __init__(self, args: argparse.Namespace, layout: RunLayout, attempt: int) -> None:
        self._attempt = attempt
        # Line buffered: a reader sees whole lines, and a killed trainer loses none that it has logged.
        self._file = layout.metrics.open("a", buffering=1)
        self._wandb = _init_wandb(args, layout)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step; -1 stands for before the first."""
        row = {"step": step, "attempt": self._attempt, "time": time.time(), **metrics}
        self._file.write(json.dumps(row) + "\n")
        self._to_wandb(lambda run: run.log({"step": step, **metrics}))

    def finish(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._to_wandb(lambda run: run.finish())

    def _to_wandb(self, call: Callable[[Any], object]) -> None:
        """W&B's own process may be gone, as it dies of the signal by which Slurm announces a preemption. That must not
        keep the trainer from saving."""
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:
            print(f"W&B takes no more metrics ({error!r}); all are in {self._file.name}", flush=True)
            self._wandb = None


def wandb_mode(args: argparse.Namespace) -> Any:
    """online, offline or disabled: `--wandb-mode`, else `$WANDB_MODE`, else online only if asked for."""
    return args.wandb_mode or os.environ.get("WANDB_MODE") or ("online" if args.use_wandb else "offline")


def _init_wandb(args: argparse.Namespace, layout: RunLayout) -> Any:
    mode = wandb_mode(args)
    if mode == "disabled":
        return None
    import wandb

    run = wandb.init(
        project=args.wandb_project,
        entity=args.wandb_team,
        group=args.wandb_group,
        name=layout.name,
        id=args.wandb_run_id or json.loads(layout.run_json.read_text())["wandb_run_id"],
        resume="allow",
        dir=args.wandb_dir or layout.wandb,
        mode=mode,
        config=dump(args),
        # The console belongs to the job's own log files.
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
