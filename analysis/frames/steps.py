"""The frame of steps, made from a run's lines of metrics, and what is read off it: metrics, phases, restarts."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

STEP_KEYS = ["step", "attempt", "time"]
PHASES = ["generate", "reward", "train", "update_weights", "save"]


def metric_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Lines of metrics with `STEP_KEYS` in front; lines without a step are left out."""
    frame = rows.reindex(columns=list(dict.fromkeys([*STEP_KEYS, *rows])))
    frame = frame[frame["step"].notna()].reset_index(drop=True)
    return frame.assign(attempt=frame["attempt"].fillna(0))


def steps_frame(rows: pd.DataFrame, *, every_attempt: bool = False) -> pd.DataFrame:
    """One row a step, ascending, from `metric_rows`. Of a step that several attempts trained, the newest attempt's
    row, or all of them if `every_attempt`."""
    others = [name for name in rows if name not in STEP_KEYS]
    frame = rows.reindex(columns=[*STEP_KEYS, *others])
    frame = frame.assign(step=frame["step"].astype("int64"), attempt=frame["attempt"].astype("int64"))
    frame = frame.sort_values(["step", "attempt"], kind="stable")
    if not frame["step"].is_unique:
        frame = _newest_rows(frame, ["step", "attempt"] if every_attempt else ["step"])
    return with_time(frame.reset_index(drop=True))


def _newest_rows(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The last one of each key among sorted rows; rows of one step and attempt are parts of one row."""
    if frame.duplicated(["step", "attempt"]).any():  # where both hold a metric, the one written last counts
        frame = frame.groupby(["step", "attempt"], as_index=False, sort=False).last()
    return frame.drop_duplicates(keys, keep="last")


def long_frame(steps: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """One row a step and number: `keys`, `metric`, `value`, by step and then in order of the columns."""
    numbers = [*keys, *(name for name in steps.select_dtypes("number") if name not in keys)]
    long = steps[numbers].melt(list(keys), var_name="metric", value_name="value", ignore_index=False)
    long = long.dropna(subset="value").sort_index(kind="stable")
    return long.reset_index(drop=True)


def trained(steps: pd.DataFrame) -> pd.DataFrame:
    """The rows of steps that were trained: all but the evaluation before training."""
    return steps[steps["step"] >= 0]


def metric(steps: pd.DataFrame, name: str) -> pd.Series:
    """The recorded values of a metric, indexed by step; empty if it was never recorded."""
    if name not in steps:
        return pd.Series(dtype="float64")
    return steps.set_index("step")[name].dropna()


def eval_names(steps: pd.DataFrame) -> list[str]:
    """The metric of each evaluation set that holds its mean reward: `eval/NAME`."""
    return [name for name in map(str, steps.columns) if name.startswith("eval/") and name.count("/") == 1]


def resumed_at(steps: pd.DataFrame) -> list[tuple[int, int]]:
    """Number and first step of every attempt but the first."""
    first = trained(steps).groupby("attempt", as_index=False)["step"].min()
    return list(zip(first["attempt"].tolist(), first["step"].tolist(), strict=True))[1:]


def phase_seconds(steps: pd.DataFrame) -> pd.DataFrame:
    """Wall seconds of every trained step by phase: columns of `PHASES` and `other`, indexed by step.

    Generation and rewards count as long as the trainer waits for them (`perf/rollout_s`): the part that overlaps with
    training takes no time of the step. `other` is the rest of `perf/step_s`, never below 0.
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


def with_time(frame: pd.DataFrame) -> pd.DataFrame:
    """`time` as UTC timestamps."""
    # A float holds seconds since 1970 to a fraction of a microsecond; its further digits are noise.
    time = pd.to_datetime(frame["time"].astype("float64"), unit="s", utc=True).dt.round("us")
    return frame.assign(time=time)
