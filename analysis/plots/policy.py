"""Views of the policy: rewards, lengths, groups, entropy, gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis import metrics
from analysis.frames.run import RunFrames
from analysis.frames.steps import metric
from analysis.plots.style import (
    BLUE,
    EVAL_COLOURS,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PINK,
    RED,
    SKY,
    attempt_marks,
    dress,
    label_last,
    length_limit,
    new_axes,
    smooth,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS_DONE = "training steps done"


def reward_curve(run: RunFrames, ax: Axes | None = None) -> Axes:
    """Mean reward of the training samples and of every evaluation set, against training steps done.

    The thin line is each step, the thick one (from 15 steps on) a centred running mean.
    """
    ax = new_axes(ax)
    trained = metric(run.steps, "rollout/reward")
    if len(trained):
        ax.plot(trained.index, trained, color=BLUE, linewidth=0.8, alpha=0.4)
        ax.plot(trained.index, smooth(trained), color=BLUE, linewidth=2.2, label="training samples")
    sets = run.eval_scores
    for (name, scores), colour in zip(sets.items(), EVAL_COLOURS * len(sets), strict=False):
        ax.plot(
            scores.index, scores, "o-", color=colour, linewidth=1.6, markersize=5, label=f"held out: {name}"
        )
        label_last(ax, scores.index[-1], scores.iloc[-1], colour)
    attempt_marks(ax, run.steps)
    if ax.lines and ax.dataLim.y0 >= 0 and ax.dataLim.y1 <= 1:
        ax.set_ylim(-0.02, 1.04)
    return dress(ax, "Reward", STEPS_DONE, "mean reward")


def response_lengths(run: RunFrames, ax: Axes | None = None) -> Axes:
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


def reward_bands(run: RunFrames, ax: Axes | None = None) -> Axes:
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


def zero_std(run: RunFrames, ax: Axes | None = None) -> Axes:
    """Share of groups whose samples all got the same reward, split by that reward."""
    ax = new_axes(ax)
    groups = run.groups
    if len(groups):
        best = groups.groupby("step")["reward_max"].transform("max")
        solved = (groups["zero_std"] & (groups["reward_max"] >= best)).groupby(groups["step"]).mean()
        other = groups.groupby("step")["zero_std"].mean() - solved
        ax.stackplot(solved.index, solved, other, colors=[GREEN, ORANGE], alpha=0.85, linewidth=0,
                     labels=["all at the step's best reward", "all at another"])  # fmt: skip
        if not groups["zero_std"].any():
            ax.text(
                0.5,
                0.5,
                "none: every group has different rewards",
                transform=ax.transAxes,
                ha="center",
                color=MUTED,
            )
        ax.set_ylim(0, 1)
        ax.margins(x=0)
    attempt_marks(ax, run.steps)
    return dress(ax, "Groups that teach nothing", "step", "share of groups")


def pass_at_k(run: RunFrames, ax: Axes | None = None) -> Axes:
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


def entropy(run: RunFrames, ax: Axes | None = None) -> Axes:
    """Mean entropy of the policy's next-token distribution, by step."""
    return _line(run, "train/entropy", "Entropy", "entropy (nats)", ax, from_zero=True)


def policy_kl(run: RunFrames, ax: Axes | None = None) -> Axes:
    """How far each step moved the policy from the one that generated its samples."""
    return _line(run, "train/ppo_kl", "Policy change within a step", "KL (nats)", ax)


def grad_norm(run: RunFrames, ax: Axes | None = None) -> Axes:
    """Norm of the gradient before clipping, by step."""
    return _line(run, "train/grad_norm", "Gradient norm", "norm before clipping", ax, from_zero=True)


def _line(
    run: RunFrames, name: str, title: str, label: str, ax: Axes | None, *, from_zero: bool = False
) -> Axes:
    """One metric by step."""
    ax = new_axes(ax)
    values = metric(run.steps, name)
    if len(values):
        ax.plot(values.index, values, color=BLUE, linewidth=2)
        if from_zero:
            ax.set_ylim(0, max(1.08 * float(values[np.isfinite(values)].max()), 1e-12))
    attempt_marks(ax, run.steps)
    return dress(ax, title, "step", label)
