"""Metrics of runs as lines: by step, by response tokens trained on, or by GPU-hours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd

from analysis.frames.compare import Align, metrics_along
from analysis.frames.run import RunFrames
from analysis.frames.steps import STEP_KEYS, resumed_at, trained

AXES: tuple[Align, ...] = get_args(Align)
_MOST_POINTS = 4000  # a line; more than a screen has pixels


def metric_names(runs: Sequence[RunFrames]) -> list[str]:
    """The metrics that any of the runs records, by name."""
    names = {str(name) for run in runs for name in (*run.steps.select_dtypes("number"), *_later(run))}
    return sorted(names - {*STEP_KEYS})


def lines(run: RunFrames, metrics: Sequence[str], axis: Align) -> dict[str, dict[str, list[float]]]:
    """Lines of a run: `x` and `y` of each metric that it records.

    Raises:
        ValueError: the run does not record what the axis takes.
    """
    frame, later = metrics_along(run, axis), _later(run)
    found = {}
    for name in metrics:
        if name in later:
            values = later[name].reindex(trained(run.steps)["step"]).set_axis(frame.index)
        elif name in frame:
            values = frame[name].astype("float64")
        else:
            continue
        values = values[np.isfinite(values) & np.isfinite(frame.index.to_numpy(dtype=float))]
        if len(values) > _MOST_POINTS:
            values = values.iloc[np.unique(np.linspace(0, len(values) - 1, _MOST_POINTS).astype(int))]
        if len(values):
            found[name] = {"x": values.index.tolist(), "y": values.tolist()}
    return found


def _later(run: RunFrames) -> dict[str, pd.Series]:
    """Evaluations made later as metrics `eval/NAME/SET`, by the step on whose line one in training would be."""
    scores = {f"eval/{name}": each for name, each in run.eval_scores.items() if "/" in name}
    return {name: each.set_axis(each.index - 1) for name, each in scores.items()}


def restarts(run: RunFrames) -> list[dict[str, Any]]:
    """Where attempts after the first went on: `attempt` and `step`."""
    return [{"attempt": attempt, "step": step} for attempt, step in resumed_at(run.steps)]
