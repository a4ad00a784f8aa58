"""Checks of the policy: each looks for one thing that goes wrong, and finds nothing where its data is missing."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis import metrics
from analysis.checks.findings import ERROR, WARNING, Finding, ends
from analysis.frames.run import RunFrames
from analysis.frames.steps import eval_names, metric, trained

_LAST_STEPS = 10
_CHOOSE = "The prompts have become too {}: choose others, or sample more per prompt."


def mismatch_drift(run: RunFrames) -> Finding | None:
    """Trainer and engine disagree on the same tokens, or do so more and more."""
    gap = metric(run.steps, "train/logprob_abs_diff")
    if gap.empty:
        return None
    early, late = ends(gap)
    if late < 1e-3 or (late < 0.02 and late < 3 * early):
        return None
    tokens = metrics.token_quantiles(run, metrics.recorded_steps(run, most=1 << 30)[-1:])
    seen = [
        f"; in step {step} one token in fifty has a ratio below {row['ratio_q01']:.3g} or above {row['ratio_q99']:.3g}"
        for step, row in tokens.iterrows()
    ]
    return Finding(
        "mismatch-drift", ERROR if late > 0.02 else WARNING,
        f"mean |trainer - engine| went from {early:.2g} to {late:.2g} nats" + "".join(seen),
        "token_gap" if seen else "logprob_gap",
        "Compare precision and kernels of trainer and engine, and check that weights arrive whole; meanwhile correct "
        "with importance weights of the engine's log-probs.",
    )  # fmt: skip


def reward_hacking(run: RunFrames) -> Finding | None:
    """Training reward rises while the held-out score does not, or answers grow with it."""
    reward, length = metric(run.steps, "rollout/reward"), metric(run.steps, "rollout/response_length")
    if len(reward) < 8 or len(length) < 8:
        return None
    (reward_early, reward_late), (length_early, length_late) = ends(reward), ends(length)
    gain = reward_late - reward_early
    low, high = metrics.reward_range(run)
    share = gain / (high - low) if high > low else 0.0  # of all that samples of this run have got
    hints = []
    for name in eval_names(run.steps):
        score = metric(run.steps, name)
        if len(score) > 2 and share > 0.2 and score.iloc[-1] - score.iloc[0] < 0.25 * gain:
            hints.append(f"{name} only {score.iloc[0]:.3g} → {score.iloc[-1]:.3g}")
    if share > 0.1 and length_late > 2 * length_early:
        hints.append(f"answers {length_late / length_early:.1f} times as long")
    if not hints:
        return None
    return Finding(
        "reward-hacking", WARNING,
        f"reward {reward_early:.3g} → {reward_late:.3g}, but " + " and ".join(hints),
        "reward_curve",
        "Read the best samples of the last steps (run.browse()); check what the reward pays for beside the answer.",
        f"from={max(0, int(run.samples['step'].max()) - 2)}&sort=-reward" if len(run.samples) else "",
    )  # fmt: skip


def entropy_collapse(run: RunFrames) -> Finding | None:
    """The policy has become nearly deterministic."""
    entropy = metric(run.steps, "train/entropy")
    if len(entropy) < 8:
        return None
    early, late = ends(entropy)
    if early <= 0 or late > 0.1 * early:
        return None
    return Finding(
        "entropy-collapse", WARNING,
        f"entropy fell from {early:.3g} to {late:.3g} nats",
        "entropy",
        "Raise --eps-clip-high or --entropy-coef, lower the learning rate, or sample at a higher temperature.",
    )  # fmt: skip


def zero_std_groups(run: RunFrames) -> Finding | None:
    """Most groups teach nothing."""
    share = metric(run.steps, "rollout/zero_std_ratio")
    if share.empty or ends(share)[1] < 0.6:
        return None
    evidence, advice = _same_rewards(run)
    return Finding(
        "zero-std-groups", WARNING,
        f"{ends(share)[1]:.0%} of the last groups have samples that all got the same reward{evidence}",
        "zero_std",
        advice,
    )  # fmt: skip


def _same_rewards(run: RunFrames) -> tuple[str, str]:
    """At which end of the run's rewards the groups of equal rewards lie, and what follows from that."""
    low, high = metrics.reward_range(run)
    groups = run.groups
    if groups.empty or not high > low:
        return (
            "",
            "Choose easier or harder prompts, whichever the rewards call for, or sample more per prompt.",
        )
    last = groups[groups["zero_std"] & (groups["step"] >= groups["step"].max() - _LAST_STEPS)]
    level = (last["reward_mean"] - low) / (high - low)
    best, worst = float((level > 0.9).mean()), float((level < 0.1).mean())
    if best > 0.5:
        return f", most of them the best, {high:.3g}", _CHOOSE.format("easy")
    if worst > 0.5:
        return f", most of them the worst, {low:.3g}", _CHOOSE.format("hard")
    return (
        f", between {low:.3g} and {high:.3g}",
        "Let the reward tell apart what it takes for equal, or sample more.",
    )


def truncation(run: RunFrames) -> Finding | None:
    """Many answers end at the length limit."""
    share = metric(run.steps, "rollout/truncated_ratio")
    if share.empty or ends(share)[1] < 0.1:
        return None
    return Finding(
        "truncation", WARNING,
        f"{ends(share)[1]:.0%} of the last samples were cut off by the length limit",
        "response_lengths",
        "Raise --rollout-max-response-len, or make short answers worth more: the end of a cut-off one is missing.",
        "status=truncated&sort=-step",
    )  # fmt: skip


def not_finite(run: RunFrames) -> Finding | None:
    """A loss or gradient is not a finite number."""
    steps = trained(run.steps).set_index("step")
    for name in ("train/loss", "train/grad_norm"):
        column = steps.get(name, pd.Series(dtype=float))
        others = steps.get("train/lr", column)
        bad = column[np.isinf(column) | (column.isna() & others.notna())]
        if len(bad):
            return Finding(
                "not-finite", ERROR, f"{name} is not finite in step {bad.index[0]} and {len(bad) - 1} more",
                "grad_norm", "Lower the learning rate, and look at the samples of that step.",
            )  # fmt: skip
    return None
