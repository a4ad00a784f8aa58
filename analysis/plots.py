"""Pictures of a run: one function a view, each draws on the Axes it is given or a new one and returns it.

matplotlib is imported when the first picture is drawn. The colours are Okabe and Ito's, which people with
any common colour blindness can tell apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis._frames import PHASES, phase_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis._run import Run

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
INK, MUTED, GRID = "#222222", "#767676", "#E6E6E6"
EVAL_COLOURS = [RED, GREEN, PINK, SKY, ORANGE]
PHASE_COLOURS = dict(zip([*PHASES, "other"], [BLUE, PINK, ORANGE, GREEN, SKY, "#BDBDBD"], strict=True))

STEPS_DONE = "training steps done"
_LEGEND_COLUMNS = 3


def reward_curve(run: Run, ax: Axes | None = None) -> Axes:
    """Mean reward of the training samples and of every evaluation set, against training steps done.

    The thin line is each step, the thick one (from 15 steps on) a centred running mean.
    """
    ax = _axes(ax)
    trained = _column(run.steps, "rollout/reward")
    if len(trained):
        ax.plot(trained.index, trained, color=BLUE, linewidth=0.8, alpha=0.4)
        ax.plot(trained.index, _smooth(trained), color=BLUE, linewidth=2.2, label="training samples")
    sets = [name for name in map(str, run.steps.columns) if name.startswith("eval/") and name.count("/") == 1]
    for name, colour in zip(sets, EVAL_COLOURS * len(sets), strict=False):
        scores = _column(run.steps, name)
        # The evaluation on the line of step k used the weights that step k + 1 generates with.
        ax.plot(scores.index + 1, scores, "o-", color=colour, linewidth=1.6, markersize=5,
                label=f"held out: {name.removeprefix('eval/')}")  # fmt: skip
        _label_last(ax, scores.index[-1] + 1, scores.iloc[-1], colour)
    _attempt_marks(ax, run.steps)
    if ax.lines and ax.dataLim.y0 >= 0 and ax.dataLim.y1 <= 1:
        ax.set_ylim(-0.02, 1.04)
    return _dress(ax, "Reward", STEPS_DONE, "mean reward")


def response_lengths(run: Run, ax: Axes | None = None) -> Axes:
    """Response length by step: mean, median, the middle 80 % of the samples, and the length limit."""
    ax = _axes(ax)
    lengths = run.samples.groupby("step")["response_length"]
    if len(lengths):
        low, median, high = (lengths.quantile(q) for q in (0.1, 0.5, 0.9))
        ax.fill_between(
            low.index, low, high, color=BLUE, alpha=0.18, linewidth=0, label="10th to 90th percentile"
        )
        ax.plot(median.index, median, color=BLUE, linewidth=2.2, label="median")
        ax.plot(lengths.mean().index, lengths.mean(), color=INK, linewidth=1, linestyle=":", label="mean")
        ax.set_ylim(bottom=0)
        _length_limit(ax, run)
    _attempt_marks(ax, run.steps)
    return _dress(ax, "Response length", STEPS_DONE, "response length (tokens)")


def logprob_gap(run: Run, ax: Axes | None = None) -> Axes:
    """How far the trainer's log-probs are from the engine's on the same tokens, by step."""
    ax = _axes(ax)
    for name, label, colour in [
        ("train/logprob_abs_diff_max", "largest of a step", ORANGE),
        ("train/logprob_abs_diff", "mean", BLUE),
    ]:
        gap = _column(run.steps, name)
        if len(gap):
            ax.plot(gap.index, gap, color=colour, linewidth=1.8, label=label)
    if ax.lines:
        _whole_decades(ax)
    _attempt_marks(ax, run.steps)
    return _dress(ax, "Log-prob gap between trainer and engine", "step", "|trainer − engine| (nats)")


def time_breakdown(run: Run, ax: Axes | None = None) -> Axes:
    """Wall seconds of each step, stacked by phase; a phase that takes no time is left out."""
    ax = _axes(ax)
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
    _attempt_marks(ax, run.steps)
    return _dress(ax, "Time of a step", "step", "wall time (s)")


def overview(run: Run) -> Figure:
    """The four views on one page."""
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    margins = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout=margins)
    for view, ax in zip(
        [reward_curve, response_lengths, logprob_gap, time_breakdown], axes.flat, strict=True
    ):
        view(run, ax)
    figure.suptitle(run.name, x=0.01, ha="left", fontsize=16, fontweight="bold", color=INK)
    return figure


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7, 4), layout="constrained")[1]


def _column(steps: pd.DataFrame, name: str) -> pd.Series:
    """The recorded values of a metric, indexed by step."""
    if name not in steps:
        return pd.Series(dtype="float64")
    return steps.set_index("step")[name].dropna()


def _smooth(values: pd.Series) -> pd.Series:
    window = max(3, len(values) // 15) if len(values) >= 15 else 1
    return values.rolling(window, center=True, min_periods=1).mean()


def _length_limit(ax: Axes, run: Run) -> None:
    limit = run.config.get("train", {}).get("rollout_max_response_len")
    if limit and ax.dataLim.y1 > limit / 2:  # far away, it would only squeeze the curves
        ax.axhline(limit, color=RED, linewidth=1, linestyle="--")
        ax.annotate(f"limit: {limit} tokens", (1, limit), xycoords=("axes fraction", "data"), xytext=(-3, -4),
                    textcoords="offset points", ha="right", va="top", fontsize=9, color=RED)  # fmt: skip
        ax.set_ylim(top=limit * 1.12)


def _attempt_marks(ax: Axes, steps: pd.DataFrame) -> None:
    """A thin line where a later attempt of the job took over."""
    first = steps[steps["step"] >= 0].groupby("attempt")["step"].min()
    for attempt, step in list(first.items())[1:]:
        ax.axvline(step, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0.5)
        ax.annotate(f"attempt {attempt}", (step, 1), xycoords=("data", "axes fraction"), xytext=(3, -3),
                    textcoords="offset points", va="top", fontsize=8, color=MUTED)  # fmt: skip


def _label_last(ax: Axes, x: float, y: float, colour: str) -> None:
    ax.annotate(f"{y:.2f}", (x, y), xytext=(0, 7), textcoords="offset points",
                ha="center", fontsize=9, fontweight="bold", color=colour)  # fmt: skip


def _whole_decades(ax: Axes) -> None:
    """A log scale from one power of ten to another: it needs no labels in between."""
    from matplotlib.ticker import NullFormatter

    values = np.concatenate([np.asarray(line.get_ydata(), dtype="float64") for line in ax.lines])
    positive = values[values > 0]
    if not len(positive):
        return
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylim(10 ** np.floor(np.log10(positive.min())), 10 ** np.ceil(np.log10(positive.max()) + 1e-9))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _dress(ax: Axes, title: str, xlabel: str, ylabel: str) -> Axes:
    """What all views share; the legend stands between title and picture, where it hides no data."""
    from matplotlib.ticker import MaxNLocator

    labels = ax.get_legend_handles_labels()[1]
    legend_rows = -(-len(labels) // _LEGEND_COLUMNS)
    pad = 10 + 16 * legend_rows  # points
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=pad)
    ax.set_xlabel(xlabel, color=MUTED)
    ax.set_ylabel(ylabel, color=MUTED)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(which="both", colors=MUTED, labelsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    if labels:
        ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=_LEGEND_COLUMNS,
                  frameon=False, fontsize=9, labelcolor=INK)  # fmt: skip
    else:
        ax.text(0.5, 0.5, "nothing recorded yet", transform=ax.transAxes, ha="center", color=MUTED)
    return ax
