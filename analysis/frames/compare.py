"""Runs side by side: each on one row, and two compared: what they were given, and where they part."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.frames.run import RunFrames
from analysis.frames.steps import metric, trained

Align = Literal["step", "tokens", "gpu_hours"]

_GIVEN = ("config.", "version.", "git_commit", "python")
_POINTS = 50


def run_row(name: str, run: RunFrames) -> dict[str, Any]:
    """A run on one row, under `name`: state, headline numbers, versions, git, W&B url, dotted configuration."""
    train = run.config.get("train", run.config)
    steps = trained(run.steps)
    reward = metric(steps, "rollout/reward")
    gpu_hours = run.attempts["gpu_hours"]
    row = {
        "run": name,
        "path": str(run.path),
        "state": _state(run),
        "created": pd.to_datetime(run.info.get("created", pd.NaT), utc=True),
        "steps": len(steps),
        "num_rollout": train.get("num_rollout"),
        "attempts": len(run.attempts),
        "gpu_hours": float(gpu_hours.sum()) if len(gpu_hours) else None,
        "reward_first": float(reward.iloc[0]) if len(reward) else None,
        "reward_last": float(reward.iloc[-1]) if len(reward) else None,
        "git_commit": run.info.get("git_commit"),
        "python": run.info.get("python"),
        "wandb_run_id": run.info.get("wandb_run_id"),
        "wandb_url": _wandb_url(run, train),
    }
    versions = {
        f"version.{package}": value for package, value in sorted(run.info.get("packages", {}).items())
    }
    return {**row, **versions, **{f"config.{key}": value for key, value in _dotted(train).items()}}


def _state(run: RunFrames) -> str:
    """finished, failed or stopped; running if the last attempt has not ended; before the first one, its status."""
    if run.info.get("state"):  # of W&B
        return str(run.info["state"])
    marks = run.events[run.events["kind"].isin(["attempt_started", "attempt_finished"])]
    if marks.empty:
        return str(run.info.get("status", {}).get("phase", "submitted"))
    last = marks.iloc[-1]
    return "running" if last["kind"] == "attempt_started" else str(last.get("state", "stopped"))


def _dotted(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined with dots; lists become text."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value) if isinstance(value, list) else value
    return flat


def _wandb_url(run: RunFrames, train: Mapping[str, Any]) -> str | None:
    """Where W&B shows the run: as W&B says, or from the team in the configuration; None if that is unknown."""
    if run.info.get("url"):
        return str(run.info["url"])
    team, project, identity = (
        train.get("wandb_team"),
        train.get("wandb_project"),
        run.info.get("wandb_run_id"),
    )
    return f"https://wandb.ai/{team}/{project}/runs/{identity}" if team and project and identity else None


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        given: differences in configuration, versions and commit: a row each, a column a run.
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


def compare(a: RunFrames, b: RunFrames, *, align: Align = "step", tolerance: float = 1e-6) -> Comparison:
    """Compare two runs.

    Args:
        align: "step"; or "tokens" (response tokens trained on so far) or "gpu_hours" (in steps so far), for which
            the metrics are interpolated at 50 points that both runs have reached.
        tolerance: relative difference from which on two values count as different.

    Raises:
        ValueError: another `align`, or a run does not record the metric that it needs.
    """
    names = (a.name, b.name) if a.name != b.name else (f"{a.name} (a)", f"{b.name} (b)")
    if align not in ("step", "tokens", "gpu_hours"):
        raise ValueError(f'unknown align "{align}": choose from step, tokens, gpu_hours')
    frames = [metrics_along(run, align) for run in (a, b)]
    if align != "step":
        frames = _common_points(frames)
    shared = [name for name in frames[0] if name in frames[1]]
    metrics = pd.concat([frame[shared] for frame in frames], axis=1, keys=names).swaplevel(axis=1)
    ordered = metrics.reindex(columns=pd.MultiIndex.from_product([shared, names]))
    return Comparison(names, _given(a, b, names), _parted(ordered, names, tolerance), ordered, align)


def _given(a: RunFrames, b: RunFrames, names: tuple[str, str]) -> pd.DataFrame:
    rows = [
        {key: value for key, value in run_row(run.name, run).items() if key.startswith(_GIVEN)}
        for run in (a, b)
    ]
    keys = sorted({*rows[0], *rows[1]})
    table = {key: [row.get(key) for row in rows] for key in keys}
    differing = {key: values for key, values in table.items() if values[0] != values[1]}
    return pd.DataFrame.from_dict(differing, orient="index", columns=list(names), dtype=object)


def metrics_along(run: RunFrames, align: Align) -> pd.DataFrame:
    """A run's metrics, a row a trained step, indexed along an axis of `compare`.

    Raises:
        ValueError: the run does not record what the axis takes.
    """
    steps = trained(run.steps).set_index("step")
    numbers = steps.select_dtypes("number").drop(columns="attempt", errors="ignore")
    if align == "step":
        return numbers
    source = {"tokens": "rollout/tokens", "gpu_hours": "perf/step_s"}[align]
    if source not in numbers:
        raise ValueError(f'{run.path} does not record {source}, which align="{align}" takes')
    scale = 1.0 if align == "tokens" else run.gpus / 3600
    if not scale:
        raise ValueError(f"{run.path} used no GPUs, so there are no GPU-hours to align by")
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
