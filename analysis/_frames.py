"""Frames made from a run's JSON lines: steps, events, and the seconds of each phase of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

STEP_KEYS = ["step", "attempt", "time"]
EVENT_KEYS = ["time", "attempt", "kind", "role", "index"]
PHASES = ["generate", "reward", "train", "update_weights", "save"]


def metric_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Lines of metrics with `STEP_KEYS` in front; those without a step are left out."""
    frame = rows.reindex(columns=list(dict.fromkeys([*STEP_KEYS, *rows])))
    frame = frame[frame["step"].notna()].reset_index(drop=True)
    return frame.assign(attempt=frame["attempt"].fillna(0))


def steps_frame(rows: pd.DataFrame, *, every_attempt: bool = False) -> pd.DataFrame:
    """One row a step, ascending; of a step that several attempts trained, the newest attempt's row (or all)."""
    others = [name for name in rows if name not in STEP_KEYS]
    frame = rows.reindex(columns=[*STEP_KEYS, *others])
    frame = frame.assign(step=frame["step"].astype("int64"), attempt=frame["attempt"].astype("int64"))
    frame = frame.sort_values(["step", "attempt"], kind="stable")
    if not frame["step"].is_unique:
        frame = _newest_rows(frame, ["step", "attempt"] if every_attempt else ["step"])
    return _with_time(frame.reset_index(drop=True))


def _newest_rows(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Of sorted rows the last of each key; those of one step and attempt are parts of one row."""
    if frame.duplicated(["step", "attempt"]).any():  # of a number twice, the one written last
        frame = frame.groupby(["step", "attempt"], as_index=False, sort=False).last()
    return frame.drop_duplicates(keys, keep="last")


def long_frame(steps: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """One row a step and number: `keys`, `metric`, `value`, by step and then in order of the columns."""
    numbers = [*keys, *(name for name in steps.select_dtypes("number") if name not in keys)]
    long = steps[numbers].melt(list(keys), var_name="metric", value_name="value", ignore_index=False)
    long = long.dropna(subset="value").sort_index(kind="stable")
    return long.reset_index(drop=True)


def events_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row an event, in order of time; fields that an event kind lacks are missing."""
    frame = _with_time(pd.DataFrame(list(rows), columns=_columns(rows, EVENT_KEYS)))
    frame = frame.astype({"attempt": "Int64", "index": "Int64"})
    return frame.sort_values("time", kind="stable", ignore_index=True)


def phase_seconds(steps: pd.DataFrame) -> pd.DataFrame:
    """Wall seconds of every trained step by phase: columns of `PHASES` and `other`, indexed by step.

    Generation and rewards count as long as the trainer waits for them (`perf/rollout_s`): what of them overlaps with
    training takes no time of the step. `other` is what `perf/step_s` holds beyond the phases, never below 0.
    """
    trained = steps[steps["perf/step_s"].notna()] if "perf/step_s" in steps else steps.iloc[:0]
    frame = pd.DataFrame({name: _seconds(trained, name) for name in PHASES}).fillna(0.0)
    work = frame["generate"] + frame["reward"]
    waited = _seconds(trained, "rollout") if "perf/rollout_s" in trained else work
    share = (waited.fillna(work) / work.where(work > 0)).clip(upper=1.0).fillna(1.0)
    frame[["generate", "reward"]] = frame[["generate", "reward"]].mul(share, axis=0)
    frame["other"] = (_seconds(trained, "step") - frame.sum(axis=1)).clip(lower=0.0)
    return frame.set_axis(pd.Index(trained["step"], name="step"))


def _seconds(steps: pd.DataFrame, phase: str) -> pd.Series:
    return steps.get(f"perf/{phase}_s", pd.Series(0.0, index=steps.index)).astype("float64")


def _columns(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*keys, *(name for row in rows for name in row)]))


def _with_time(frame: pd.DataFrame) -> pd.DataFrame:
    """`time` as UTC timestamps."""
    # A float holds seconds since 1970 to a fraction of a microsecond; its further digits are noise.
    time = pd.to_datetime(frame["time"].astype("float64"), unit="s", utc=True).dt.round("us")
    return frame.assign(time=time)
