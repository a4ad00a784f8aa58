"""Pictures of a run: one function a view, each draws on the Axes it is given or a new one and returns it.

matplotlib is imported when the first picture is drawn. The colours are Okabe and Ito's, which people with
any common colour blindness can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from analysis import metrics
from analysis._frames import phase_seconds
from analysis._plot_style import (
    BLUE,
    EVAL_COLOURS,
    GREEN,
    INK,
    ORANGE,
    PHASE_COLOURS,
    PINK,
    RED,
    SKY,
    attempt_marks,
    dress,
    label_last,
    length_limit,
    metric,
    new_axes,
    smooth,
    whole_decades,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis._run import Run

STEPS_DONE = "training steps done"


def reward_curve(run: Run, ax: Axes | None = None) -> Axes:
    """Mean reward of the training samples and of every evaluation set, against training steps done.

    The thin line is each step, the thick one (from 15 steps on) a centred running mean.
    """
    ax = new_axes(ax)
    trained = metric(run.steps, "rollout/reward")
    if len(trained):
        ax.plot(trained.index, trained, color=BLUE, linewidth=0.8, alpha=0.4)
        ax.plot(trained.index, smooth(trained), color=BLUE, linewidth=2.2, label="training samples")
    sets = [name for name in map(str, run.steps.columns) if name.startswith("eval/") and name.count("/") == 1]
    for name, colour in zip(sets, EVAL_COLOURS * len(sets), strict=False):
        scores = metric(run.steps, name)
        # The evaluation on the line of step k used the weights that step k + 1 generates with.
        ax.plot(scores.index + 1, scores, "o-", color=colour, linewidth=1.6, markersize=5,
                label=f"held out: {name.removeprefix('eval/')}")  # fmt: skip
        label_last(ax, scores.index[-1] + 1, scores.iloc[-1], colour)
    attempt_marks(ax, run.steps)
    if ax.lines and ax.dataLim.y0 >= 0 and ax.dataLim.y1 <= 1:
        ax.set_ylim(-0.02, 1.04)
    return dress(ax, "Reward", STEPS_DONE, "mean reward")


def response_lengths(run: Run, ax: Axes | None = None) -> Axes:
    """Response length by step: mean, median, the middle 80 % of the samples, and the length limit."""
    ax = new_axes(ax)
    lengths = run.samples.groupby("step")["response_length"]
    if len(lengths):
        low, median, high = (lengths.quantile(q) for q in (0.1, 0.5, 0.9))
        ax.fill_between(
            low.index, low, high, color=BLUE, alpha=0.18, linewidth=0, label="10th to 90th percentile"
        )
        ax.plot(median.index, median, color=BLUE, linewidth=2.2, label="median")
        ax.plot(lengths.mean().index, lengths.mean(), color=INK, linewidth=1, linestyle=":", label="mean")
        ax.set_ylim(bottom=0)
        length_limit(ax, run)
    attempt_marks(ax, run.steps)
    return dress(ax, "Response length", STEPS_DONE, "response length (tokens)")


def logprob_gap(run: Run, ax: Axes | None = None) -> Axes:
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


def time_breakdown(run: Run, ax: Axes | None = None) -> Axes:
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


def entropy(run: Run, ax: Axes | None = None) -> Axes:
    """Mean entropy of the policy's next-token distribution, by step."""
    return _line(run, "train/entropy", "Entropy", "entropy (nats)", ax, from_zero=True)


def policy_kl(run: Run, ax: Axes | None = None) -> Axes:
    """How far each step moved the policy from the one that generated its samples."""
    return _line(run, "train/ppo_kl", "Policy change within a step", "KL (nats)", ax)


def grad_norm(run: Run, ax: Axes | None = None) -> Axes:
    """Norm of the gradient before clipping, by step."""
    return _line(run, "train/grad_norm", "Gradient norm", "norm before clipping", ax, from_zero=True)


def zero_std(run: Run, ax: Axes | None = None) -> Axes:
    """Share of groups whose samples all got the same reward, split by what that reward was."""
    ax = new_axes(ax)
    groups = run.groups
    if len(groups):
        best = groups.groupby("step")["reward_max"].transform("max")
        solved = (groups["zero_std"] & (groups["reward_max"] >= best)).groupby(groups["step"]).mean()
        other = groups.groupby("step")["zero_std"].mean() - solved
        ax.stackplot(solved.index, solved, other, colors=[GREEN, ORANGE], alpha=0.85, linewidth=0,
                     labels=["all at the step's best reward", "all at another"])  # fmt: skip
        ax.set_ylim(0, 1)
        ax.margins(x=0)
    attempt_marks(ax, run.steps)
    return dress(ax, "Groups that teach nothing", "step", "share of groups")


def reward_bands(run: Run, ax: Axes | None = None) -> Axes:
    """How the rewards of each step's samples are distributed, stacked from low to high."""
    ax = new_axes(ax)
    if len(run.samples):
        shares = metrics.reward_bands(run.samples)
        shares = shares.loc[:, shares.sum() > 0]
        colours = dict(zip(["≤ 0", "0 to ¼", "¼ to ½", "½ to ¾", "¾ to 1", "≥ 1", "no reward"],
                           [RED, ORANGE, "#F0E442", SKY, BLUE, GREEN, "#BDBDBD"], strict=True))  # fmt: skip
        ax.stackplot(shares.index, shares.to_numpy().T, colors=[colours[str(name)] for name in shares],
                     labels=[f"reward {name}" if name != "no reward" else str(name) for name in shares],
                     linewidth=0, alpha=0.9)  # fmt: skip
        ax.set_ylim(0, 1)
        ax.margins(x=0)
    attempt_marks(ax, run.steps)
    return dress(ax, "Rewards of the samples", "step", "share of samples")


def pass_at_k(run: Run, ax: Axes | None = None) -> Axes:
    """Unbiased pass@k of the training prompts, by step; a reward of at least 1 is correct."""
    ax = new_axes(ax)
    names = [str(name) for name in run.groups if str(name).startswith("pass@")]
    table = run.groups.groupby("step")[names].mean()
    for name, colour in zip(names, [BLUE, SKY, GREEN, ORANGE, RED, PINK], strict=False):
        ax.plot(table.index, smooth(table[name]), color=colour, linewidth=2, label=name)
    if len(table):
        ax.set_ylim(-0.02, 1.04)
    attempt_marks(ax, run.steps)
    return dress(ax, "Solved by at least one of k samples", "step", "pass@k")


def staleness(run: Run, ax: Axes | None = None) -> Axes:
    """How many updates old the weights were that generated a step's samples: mean and largest."""
    ax = new_axes(ax)
    if len(run.samples):
        age = metrics.staleness(run)
        ax.plot(age.index, age["max"], color=ORANGE, linewidth=1.4, label="oldest")
        ax.plot(age.index, age["mean"], color=BLUE, linewidth=2.2, label="mean")
        ax.set_ylim(bottom=0, top=max(1.0, float(age["max"].max()) * 1.1))
    attempt_marks(ax, run.steps)
    return dress(ax, "Age of the weights", "step", "updates behind")


def gpu_hours(run: Run, ax: Axes | None = None) -> Axes:
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
    dress(ax, f"GPU-hours (goodput {cost['goodput']:.0%})", "allocated GPU-hours", "")
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.grid(visible=False)
    return ax


def comparison(runs: Iterable[Run], name: str = "rollout/reward", ax: Axes | None = None) -> Axes:
    """One metric of several runs, smoothed, the recorded values behind it."""
    ax = new_axes(ax)
    for run, colour in zip(runs, cycle([BLUE, ORANGE, GREEN, PINK, SKY, RED]), strict=False):
        values = metric(run.steps, name)
        ax.plot(values.index, values, color=colour, linewidth=0.8, alpha=0.35)
        ax.plot(values.index, smooth(values), color=colour, linewidth=2.2, label=run.name)
    return dress(ax, name, "step", name)


def dashboard(run: Run) -> Figure:
    """The most telling views on one page."""
    import matplotlib.pyplot as plt

    views = [reward_curve, reward_bands, pass_at_k, response_lengths, zero_std, entropy, logprob_gap, time_breakdown,
             gpu_hours]  # fmt: skip
    figure, axes = plt.subplots(3, 3, figsize=(18, 12.5), layout="constrained")
    for view, ax in zip(views, axes.flat, strict=True):
        view(run, ax)
    figure.get_layout_engine().set(w_pad=0.18, h_pad=0.14)  # type: ignore[union-attr, call-arg]
    figure.suptitle(run.name, x=0.01, ha="left", fontsize=18, fontweight="bold", color=INK)
    return figure


def _line(run: Run, name: str, title: str, label: str, ax: Axes | None, *, from_zero: bool = False) -> Axes:
    """One metric by step."""
    ax = new_axes(ax)
    values = metric(run.steps, name)
    if len(values):
        ax.plot(values.index, values, color=BLUE, linewidth=2)
        if from_zero:
            ax.set_ylim(bottom=0)
    attempt_marks(ax, run.steps)
    return dress(ax, title, "step", label)


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
