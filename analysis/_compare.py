"""Two runs side by side: what they were given, and where they part."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from analysis._attempts import gpu_count
from analysis._runs import run_row

if TYPE_CHECKING:
    from analysis._run import Run

Align = Literal["step", "tokens", "gpu_hours"]

_GIVEN = ("config.", "version.", "git_commit", "python")
_POINTS = 50


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        given: what differs in configuration, versions and commit: a row each, a column a run.
        parted: first step at which each metric differs, with both values; metrics that never do are left out.
        metrics: both runs' metrics along the axis: columns (metric, run).
        axis: what they are aligned by.
    """

    names: tuple[str, str]
    given: pd.DataFrame
    parted: pd.DataFrame
    metrics: pd.DataFrame
    axis: Align

    def _repr_html_(self) -> str:
        parts = [("differs", self.given), ("parts at", self.parted)]
        tables = [f"<h4>{title}</h4>{frame.to_html(escape=True)}" for title, frame in parts]
        return f"<b>{html.escape(' and '.join(self.names))}</b>" + "".join(tables)


def compare(a: Run, b: Run, *, align: Align = "step", tolerance: float = 1e-6) -> Comparison:
    """Compare two runs.

    Args:
        align: "step"; or "tokens" (response tokens trained on so far) or "gpu_hours" (in steps so far), for which
            the metrics are interpolated at 50 points that both runs have reached.
        tolerance: relative difference from which on two values count as different.

    Raises:
        ValueError: another `align`, or a run does not record what it takes.
    """
    names = (a.name, b.name) if a.name != b.name else (f"{a.name} (a)", f"{b.name} (b)")
    if align not in ("step", "tokens", "gpu_hours"):
        raise ValueError(f'unknown align "{align}": choose from step, tokens, gpu_hours')
    frames = [_indexed(run, align) for run in (a, b)]
    if align != "step":
        frames = _common_points(frames)
    shared = [name for name in frames[0] if name in frames[1]]
    metrics = pd.concat([frame[shared] for frame in frames], axis=1, keys=names).swaplevel(axis=1)
    ordered = metrics.reindex(columns=pd.MultiIndex.from_product([shared, names]))
    return Comparison(names, _given(a, b, names), _parted(ordered, names, tolerance), ordered, align)


def _given(a: Run, b: Run, names: tuple[str, str]) -> pd.DataFrame:
    rows = [
        {key: value for key, value in run_row(run.name, run).items() if key.startswith(_GIVEN)}
        for run in (a, b)
    ]
    keys = sorted({*rows[0], *rows[1]})
    table = {key: [row.get(key) for row in rows] for key in keys}
    differing = {key: values for key, values in table.items() if values[0] != values[1]}
    return pd.DataFrame.from_dict(differing, orient="index", columns=list(names), dtype=object)


def _indexed(run: Run, align: Align) -> pd.DataFrame:
    steps = run.steps[run.steps["step"] >= 0].set_index("step")
    numbers = steps.select_dtypes("number").drop(columns="attempt", errors="ignore")
    if align == "step":
        return numbers
    source = {"tokens": "rollout/tokens", "gpu_hours": "perf/step_s"}[align]
    if source not in numbers:
        raise ValueError(f'{run.path} does not record {source}, which align="{align}" takes')
    scale = 1.0 if align == "tokens" else gpu_count(run.config) / 3600
    if not scale:
        raise ValueError(
            f"the configuration of {run.path} names no GPUs, so there are no GPU-hours to align by"
        )
    return numbers.set_axis(pd.Index(numbers[source].fillna(0).cumsum() * scale, name=align))


def _common_points(frames: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Both frames interpolated linearly at the same points, between where the later begins and the earlier ends."""
    filled = [frame for frame in frames if len(frame)]
    if len(filled) < len(frames):
        return [frame.iloc[:0] for frame in frames]
    low = max(frame.index[0] for frame in frames)
    high = min(frame.index[-1] for frame in frames)
    points = np.linspace(low, high, _POINTS) if high > low else np.array([])
    index = pd.Index(points, name=frames[0].index.name)
    return [
        pd.DataFrame({name: _interpolated(frame[name], points) for name in frame}, index=index)
        for frame in frames
    ]


def _interpolated(values: pd.Series, points: np.ndarray) -> np.ndarray:
    known = values.dropna()
    return (
        np.interp(points, known.index, known, left=np.nan, right=np.nan)
        if len(known)
        else np.full(len(points), np.nan)
    )


def _parted(metrics: pd.DataFrame, names: tuple[str, str], tolerance: float) -> pd.DataFrame:
    rows = []
    for name in metrics.columns.get_level_values(0).unique():
        if name.startswith("perf/"):  # times never agree, and say nothing of the training
            continue
        both = metrics[name].dropna()
        a, b = both[names[0]], both[names[1]]
        differs = (a - b).abs() > tolerance * np.maximum(a.abs(), b.abs())
        if differs.any():
            at = differs.idxmax()
            rows.append({"metric": name, metrics.index.name: at, names[0]: a[at], names[1]: b[at]})
    columns = ["metric", str(metrics.index.name), *names]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values(columns[1], kind="stable", ignore_index=True)
