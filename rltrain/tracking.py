"""Where metrics go: one line a step in `metrics.jsonl` and the same numbers in W&B.

Only trainer rank 0 writes. W&B gets its own step axis instead of `step=`, because it drops rows whose step
it has seen before, which is every row that is repeated after a restart.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc.layout import RunLayout
from rltrain.arguments import dump

Row = dict[str, Any]

_OWN_KEYS = ("attempt", "time")
# The step in a history record of a `.wandb` file: the key, then the length of the value and the value, as JSON.
_WANDB_STEP = re.compile(rb"[\x0a\x12]\x04step\x82\x01([\x01-\x0a])(-?\d+)")


class Tracker:
    """Writes metrics of one attempt."""

    def __init__(self, args: argparse.Namespace, layout: RunLayout, attempt: int) -> None:
        self._attempt = attempt
        self._past: dict[int, Row] = {}
        self._path = layout.metrics
        # Line buffered: a reader sees whole lines, and a killed trainer loses none that it has logged.
        self._file = layout.metrics.open("a", buffering=1)
        self._wandb = _init_wandb(args, layout)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step; -1 stands for before the first.

        Of a step that an earlier attempt has trained they are further metrics, and part of that attempt's row.
        """
        attempt = self._past[step]["attempt"] if step in self._past else self._attempt
        row = {"step": step, "attempt": attempt, "time": time.time(), **metrics}
        self._file.write(json.dumps(row) + "\n")
        self._to_wandb(lambda run: run.log({"step": step, **metrics}))

    def catch_up(self, done: int) -> None:
        """Give W&B the steps before `done` that it lacks.

        W&B's process dies of the signal by which Slurm announces a preemption, while the trainer ends its step. Steps
        from `done` on are forgotten: they are trained again.
        """
        self._past = {step: row for step, row in read_rows(self._path).items() if step < done}
        if self._wandb is None:
            return
        last = last_step(self._wandb)
        missing = [row for step, row in sorted(self._past.items()) if last is None or step > last]
        if last is not None and "perf/eval_s" in self._past.get(last, {}):
            missing.insert(0, self._past[last])  # its evaluation was logged later, and may be lacking
        self._to_wandb(lambda run: [run.log(without_own_keys(row)) for row in missing])

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


def read_rows(path: Path) -> dict[int, Row]:
    """The newest row of each step in a `metrics.jsonl`; lines with the same step and attempt are one row."""
    rows: dict[int, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            before = rows.get(row["step"], {})
        except (ValueError, KeyError, TypeError):  # a crash cut it short
            continue
        rows[row["step"]] = before | row if before.get("attempt") == row.get("attempt") else row
    return rows


def without_own_keys(row: Row) -> Row:
    """A row of `metrics.jsonl` as W&B is given it."""
    return {name: value for name, value in row.items() if name not in _OWN_KEYS}


def last_step(run: Any) -> int | None:
    """The last step that W&B has of a run that is resumed: the server says, or the files of offline attempts."""
    if not run.offline:
        step = run.summary.get("step")
        return None if step is None else int(step)
    files = Path(run.dir).parents[1].glob(f"*run-*/run-{run.id}.wandb")
    steps = (int(digits) for path in files for length, digits in _WANDB_STEP.findall(path.read_bytes())
             if len(digits) == length[0])  # fmt: skip
    return max(steps, default=None)


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
