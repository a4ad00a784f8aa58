"""What can go wrong with the policy and be seen in a run's record; a check that lacks its data finds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import metrics
from analysis._findings import ERROR, WARNING, Finding, ends, metric_of

if TYPE_CHECKING:
    from analysis._run import Run


def mismatch_drift(run: Run) -> Finding | None:
    """Trainer and engine disagree on the same tokens, or do so more and more."""
    gap = metric_of(run, "train/logprob_abs_diff")
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


def reward_hacking(run: Run) -> Finding | None:
    """Training reward rises while the held-out score does not, or answers grow with it."""
    reward, length = metric_of(run, "rollout/reward"), metric_of(run, "rollout/response_length")
    if len(reward) < 8 or len(length) < 8:
        return None
    (reward_early, reward_late), (length_early, length_late) = ends(reward), ends(length)
    gain = reward_late - reward_early
    hints = []
    for name in _eval_names(run):
        score = metric_of(run, name)
        if len(score) > 2 and gain > 0.2 and score.iloc[-1] - score.iloc[0] < 0.25 * gain:
            hints.append(f"{name} only {score.iloc[0]:.2f} → {score.iloc[-1]:.2f}")
    if gain > 0.1 and length_late > 2 * length_early:
        hints.append(f"answers {length_late / length_early:.1f} times as long")
    if not hints:
        return None
    return Finding(
        "reward-hacking", WARNING,
        f"reward {reward_early:.2f} → {reward_late:.2f}, but " + " and ".join(hints),
        "reward_curve",
        "Read the best samples of the last steps (run.browse()); check what the reward pays for beside the answer.",
    )  # fmt: skip


def entropy_collapse(run: Run) -> Finding | None:
    """The policy has become nearly deterministic."""
    entropy = metric_of(run, "train/entropy")
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


def zero_std_groups(run: Run) -> Finding | None:
    """Most groups teach nothing."""
    share = metric_of(run, "rollout/zero_std_ratio")
    if share.empty or ends(share)[1] < 0.6:
        return None
    reward = metric_of(run, "rollout/reward")
    too_easy = len(reward) and ends(reward)[1] > 0.5
    return Finding(
        "zero-std-groups", WARNING,
        f"{ends(share)[1]:.0%} of the last groups have samples that all got the same reward",
        "zero_std",
        f"The prompts have become too {'easy' if too_easy else 'hard'}: choose others, or sample more per prompt.",
    )  # fmt: skip


def truncation(run: Run) -> Finding | None:
    """Many answers end at the length limit."""
    share = metric_of(run, "rollout/truncated_ratio")
    if share.empty or ends(share)[1] < 0.1:
        return None
    return Finding(
        "truncation", WARNING,
        f"{ends(share)[1]:.0%} of the last samples were cut off by the length limit",
        "response_lengths",
        "Raise --rollout-max-response-len, or make short answers worth more; a cut-off answer earns nothing.",
    )  # fmt: skip


def not_finite(run: Run) -> Finding | None:
    """A loss or gradient is no number."""
    for name in ("train/loss", "train/grad_norm"):
        column = run.steps[run.steps["step"] >= 0].set_index("step").get(name, pd.Series(dtype=float))
        others = run.steps[run.steps["step"] >= 0].set_index("step").get("train/lr", column)
        bad = column[np.isinf(column) | (column.isna() & others.notna())]
        if len(bad):
            return Finding(
                "not-finite", ERROR, f"{name} is not finite in step {bad.index[0]} and {len(bad) - 1} more",
                "grad_norm", "Lower the learning rate, and look at the samples of that step.",
            )  # fmt: skip
    return None


def _eval_names(run: Run) -> Iterator[str]:
    return (str(name) for name in run.steps if str(name).startswith("eval/") and str(name).count("/") == 1)
