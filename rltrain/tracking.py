"""Where metrics go: one line a step in `metrics.jsonl` and the same numbers in W&B, and for TensorBoard if asked for.

Only trainer rank 0 writes. W&B gets its own step axis instead of `step=`, because it drops rows whose step
it has seen before, which is every row that is repeated after a restart.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rltrain.arguments import dump
from rltrain.arguments.config import Config
from rltrain.run.files import Record, append_line, read_json, read_lines, replace_text
from rltrain.run.layout import RunLayout
from rltrain.run.metric_lines import newest_rows
from rltrain.tensorboard import TensorBoard, directory_of

_OWN_KEYS = ("attempt", "time")
# Beside the files of an offline attempt whose W&B ended in order: its number, and the last step that they hold. The
# names of their directories have the time of day, which may jump back from one attempt to the next.
_WHOLE = "slurmlime-last-step"
# Where offline attempts are put whose W&B died, or that W&B was silent to: what they hold is logged again, so
# `wandb sync` must not see them.
_UNFINISHED = "unfinished"
# In W&B's error when the server can't be reached; it has tried for a minute and a half by then.
_SILENT = ("context deadline exceeded", "giving up after", "timed out")


class Tracker:
    """Writes metrics of one attempt."""

    def __init__(self, config: Config, layout: RunLayout, attempt: int) -> None:
        self._attempt = attempt
        self._past: dict[int, Record] = {}
        self._path, self._kept = layout.metrics, layout.kept_metrics
        self._wandb = _init_wandb(config, layout)
        self._last: int | None = None
        self._board: TensorBoard | None = None
        if config.tracking.use_tensorboard:
            self._board = TensorBoard(directory_of(config.tracking, layout))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step; -1 stands for before the first.

        Of a step that an earlier attempt has trained they are further metrics, and part of that attempt's row.
        """
        append_line(self._path, self._row(step, metrics))
        self._last = step
        self._to_wandb(lambda run: run.log({"step": step, **metrics}))
        if self._board is not None:
            self._board.log(step, metrics)

    def keep(self, step: int, metrics: dict[str, float]) -> None:
        """Put metrics aside that are logged a little later, together with those that are not yet known.

        For the time in which a step has its checkpoint and the engines get its weights: the next attempt would go on
        after it, and find nothing of it. `catch_up` then logs what is here.
        """
        replace_text(self._kept, json.dumps(self._row(step, metrics)) + "\n")

    def _row(self, step: int, metrics: dict[str, float]) -> Record:
        attempt = self._past[step]["attempt"] if step in self._past else self._attempt
        return {"step": step, "attempt": attempt, "time": time.time(), **metrics}

    def catch_up(self, done: int) -> None:
        """Give `metrics.jsonl` and W&B the steps before `done` that they lack.

        W&B's process dies of the signal by which Slurm announces a preemption, while the trainer ends its step. What
        lies in `metrics.jsonl` and not in W&B is logged again. Steps from `done` on are forgotten: they are trained
        again.
        """
        rows = newest_rows(read_lines(self._path))
        kept = read_json(self._kept)
        if isinstance(kept, dict) and kept["step"] < done and kept["step"] not in rows:
            append_line(self._path, kept)
            rows[kept["step"]] = kept
        self._past = {step: row for step, row in rows.items() if step < done}
        if self._board is not None:
            self._board.forget_from(done)
        if self._wandb is None:
            return
        last = last_step(self._wandb)
        missing = [row for step, row in sorted(self._past.items()) if last is None or step > last]
        if not self._wandb.offline and last is not None and "perf/eval_s" in self._past.get(last, {}):
            missing.insert(0, self._past[last])  # its evaluation was logged later, and may be lacking
        self._to_wandb(lambda run: [run.log(without_own_keys(row)) for row in missing])

    def finish(self) -> None:
        """Close W&B and TensorBoard. Lines of `metrics.jsonl` are there as soon as they are logged."""
        if self._board is not None:
            self._board.finish()
        self._to_wandb(lambda run: run.finish())
        if self._wandb is not None and self._wandb.offline:
            last = max(self._past, default=None) if self._last is None else self._last
            said = {"attempt": self._attempt, "step": last}
            replace_text(_files_of(self._wandb) / _WHOLE, json.dumps(said))

    def _to_wandb(self, call: Callable[[Any], object]) -> None:
        """W&B's own process may be gone, as it dies of the signal by which Slurm announces a preemption. That must not
        keep the trainer from saving."""
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:
            print(f"W&B accepts no more metrics ({error!r}); all are in {self._path}", flush=True)
            self._wandb = None


def without_own_keys(row: Record) -> Record:
    """A row of `metrics.jsonl` as W&B is given it."""
    return {name: value for name, value in row.items() if name not in _OWN_KEYS}


def last_step(run: Any) -> int | None:
    """The last step that W&B has of a run that is resumed: the server says, or the offline attempts that are whole.

    Offline attempts that are not whole are set aside; all of them, if the server says.
    """
    own = _files_of(run)
    if not run.offline:
        for attempt in own.parent.glob(f"offline-run-*-{run.id}"):
            _set_aside(attempt)
        step = run.summary.get("step")
        return None if step is None else int(step)
    attempts = [path for path in own.parent.glob(f"*run-*-{run.id}") if path != own and not path.is_symlink()]
    for attempt in attempts:
        if not is_whole(attempt):
            _set_aside(attempt)
    return last_whole_step(attempts)


def is_whole(attempt: Path) -> bool:
    """Whether W&B ended in order with the files of this offline attempt."""
    return (attempt / _WHOLE).exists()


def last_whole_step(attempts: Iterable[Path]) -> int | None:
    """The last step of the newest of these offline attempts with which W&B ended in order; W&B has all before it."""
    whole: list[tuple[int, str, int | None]] = []
    for attempt in filter(is_whole, attempts):
        said = json.loads((attempt / _WHOLE).read_text())
        if not isinstance(said, dict):  # as an older version has written it
            said = {"attempt": -1, "step": said}
        whole.append((said["attempt"], attempt.name, said["step"]))
    return max(whole, key=lambda each: each[:2])[2] if whole else None


def _set_aside(attempt: Path) -> None:
    place = attempt.parent / _UNFINISHED
    place.mkdir(exist_ok=True)
    attempt.rename(place / attempt.name)


def _files_of(run: Any) -> Path:
    """Where W&B keeps the files of this attempt."""
    return Path(run.dir).parent


def _init_wandb(config: Config, layout: RunLayout) -> Any:
    mode: Any = config.tracking.mode_of_wandb(os.environ)
    if mode == "disabled":
        return None
    import wandb
    from wandb.errors import CommError

    try:
        return _begin_wandb(config, layout, mode)
    except CommError as error:
        if mode != "online" or not any(words in str(error) for words in _SILENT):
            raise
        print(
            f"W&B does not answer: {error}. This attempt's metrics go to {layout.metrics} and into files for `wandb"
            " sync`. The next attempt that reaches W&B sends them itself.",
            flush=True,
        )
        with suppress(SystemExit):  # it ends as its process does, which believes that the run is under way
            wandb.teardown()
        return _begin_wandb(config, layout, "offline")


def _begin_wandb(config: Config, layout: RunLayout, mode: Any) -> Any:
    import wandb

    host = {"base_url": config.tracking.wandb_host} if config.tracking.wandb_host else {}
    run = wandb.init(
        project=config.tracking.wandb_project,
        entity=config.tracking.wandb_team,
        group=config.tracking.wandb_group,
        name=layout.name,
        id=config.tracking.wandb_run_id or json.loads(layout.run_json.read_text())["wandb_run_id"],
        resume="allow",
        dir=config.tracking.wandb_dir or layout.wandb,
        mode=mode,
        config=dump(config),
        # The console belongs to the job's own log files.
        settings=wandb.Settings(console="off", silent=True, **host),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
