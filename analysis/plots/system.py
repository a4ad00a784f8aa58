"""Views of the machinery: trainer against engine, age of the weights, where time and GPU-hours go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis import metrics
from analysis.frames.run import RunFrames
from analysis.frames.steps import metric, phase_seconds
from analysis.plots.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PHASE_COLOURS,
    RED,
    SKY,
    attempt_marks,
    dress,
    new_axes,
    whole_decades,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def logprob_gap(run: RunFrames, ax: Axes | None = None) -> Axes:
    """How far the trainer's log-probs are from the engine's on the same tokens, by step."""
    ax = new_axes(ax)
    for name, label, colour in [
        ("train/logprob_abs_diff_max", "largest of a step", ORANGE),
        ("train/logprob_abs_diff", "mean", BLUE),
    ]:
        gap = metric(run.steps, name)
        if len(gap):
            ax.plot(gap.index, gap, color=colour, linewidth=1.8, label=label)
    if ax.lines:
        whole_decades(ax)
    attempt_marks(ax, run.steps)
    return dress(ax, "Log-prob gap between trainer and engine", "step", "|trainer − engine| (nats)")


def token_gap(run: RunFrames, ax: Axes | None = None) -> Axes:
    """How far the trainer's log-prob of a token is from the engine's, over the tokens of each step: quantiles.

    Where the trainer has recorded its log-probs; at most 100 steps, evenly from the whole run.
    """
    ax = new_axes(ax)
    table = metrics.token_quantiles(run, metrics.recorded_steps(run, most=100))
    if len(table):
        steps = table.index
        ax.fill_between(steps, table["gap_q01"], table["gap_q99"], color=SKY, alpha=0.35, linewidth=0,
                        label="1st to 99th percentile")  # fmt: skip
        ax.fill_between(steps, table["gap_q25"], table["gap_q75"], color=BLUE, alpha=0.4, linewidth=0,
                        label="middle half")  # fmt: skip
        ax.plot(steps, table["gap_q50"], color=BLUE, linewidth=2, label="median")
        ax.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        ax.yaxis.set_major_formatter("{x:.2g}")  # no factor of its own above the axis, where the legend is
    attempt_marks(ax, run.steps)
    return dress(ax, "Trainer against engine, token by token", "step", "trainer − engine (nats)")


def staleness(run: RunFrames, ax: Axes | None = None) -> Axes:
    """How many updates old the weights were that generated a step's samples: mean and largest."""
    ax = new_axes(ax)
    if len(run.samples):
        age = metrics.staleness(run)
        ax.plot(age.index, age["max"], color=ORANGE, linewidth=1.4, label="oldest")
        ax.plot(age.index, age["mean"], color=BLUE, linewidth=2.2, label="mean")
        ax.set_ylim(-0.03, max(1.0, float(age["max"].max()) * 1.1))
    attempt_marks(ax, run.steps)
    return dress(ax, "Age of the weights", "step", "updates behind")


def time_breakdown(run: RunFrames, ax: Axes | None = None) -> Axes:
    """Wall seconds of each step, stacked by phase; a phase that takes no time is left out."""
    ax = new_axes(ax)
    seconds = phase_seconds(run.steps)
    if len(seconds):
        seconds = seconds.reindex(range(seconds.index[0], seconds.index[-1] + 1), fill_value=0.0)
        edges = np.append(seconds.index, seconds.index[-1] + 1) - 0.5
        base = np.zeros(len(seconds))
        for phase in seconds.columns[seconds.sum() > 0]:
            top = base + seconds[phase].to_numpy()
            share = seconds[phase].sum() / seconds.to_numpy().sum()
            label = f"{phase.replace('_', ' ')} ({f'{share:.0%}' if share >= 0.01 else '<1%'})"
            ax.stairs(top, edges, baseline=base, fill=True, color=PHASE_COLOURS[phase], label=label)
            base = top
        ax.margins(x=0)
    attempt_marks(ax, run.steps)
    return dress(ax, "Time of a step", "step", "wall time (s)")


def gpu_hours(run: RunFrames, ax: Axes | None = None) -> Axes:
    """Where the allocated GPU-hours went: steps that were kept, steps that were lost, and everything else."""
    ax = new_axes(ax)
    cost = metrics.cost(run)
    kept, lost = cost["productive_gpu_hours"], cost["lost_gpu_hours"]
    rest = max(cost["allocated_gpu_hours"] - kept - lost, 0.0)
    left = 0.0
    parts = [
        ("kept steps", kept, GREEN),
        ("lost steps", lost, RED),
        ("start-up, evaluation, saving", rest, "#BDBDBD"),
    ]
    for label, hours, colour in parts:
        if hours > 0:
            ax.barh([0], [hours], left=left, color=colour, height=0.5, label=f"{label}: {hours:.2g} h")
            left += hours
    ax.set_yticks([])
    ax.set_ylim(-0.6, 0.6)
    share = f" (goodput {cost['goodput']:.0%})" if left else ""
    dress(ax, f"GPU-hours{share}", "allocated GPU-hours", "")
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.grid(visible=False)
    return ax
