"""What can go wrong in a run and be seen in its record: one small check each, all run by `Run.doctor`.

A check that lacks its data finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import metrics
from analysis._findings import ERROR, NOTE, WARNING, Finding, Findings
from analysis._frames import phase_seconds

if TYPE_CHECKING:
    from analysis._run import Run


def mismatch_drift(run: Run) -> Finding | None:
    """Trainer and engine disagree on the same tokens, or do so more and more."""
    gap = _metric(run, "train/logprob_abs_diff")
    if gap.empty:
        return None
    early, late = _ends(gap)
    if late < 1e-3 or (late < 0.02 and late < 3 * early):
        return None
    return Finding(
        "mismatch-drift", ERROR if late > 0.02 else WARNING,
        f"mean |trainer - engine| went from {early:.2g} to {late:.2g} nats",
        "logprob_gap",
        "Compare precision and kernels of trainer and engine, and check that weights arrive whole; meanwhile correct "
        "with importance weights of the engine's log-probs.",
    )  # fmt: skip


def reward_hacking(run: Run) -> Finding | None:
    """Training reward rises while the held-out score does not, or answers grow with it."""
    reward, length = _metric(run, "rollout/reward"), _metric(run, "rollout/response_length")
    if len(reward) < 8 or len(length) < 8:
        return None
    (reward_early, reward_late), (length_early, length_late) = _ends(reward), _ends(length)
    gain = reward_late - reward_early
    hints = []
    for name in _eval_names(run):
        score = _metric(run, name)
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
    entropy = _metric(run, "train/entropy")
    if len(entropy) < 8:
        return None
    early, late = _ends(entropy)
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
    share = _metric(run, "rollout/zero_std_ratio")
    if share.empty or _ends(share)[1] < 0.6:
        return None
    reward = _metric(run, "rollout/reward")
    too_easy = len(reward) and _ends(reward)[1] > 0.5
    return Finding(
        "zero-std-groups", WARNING,
        f"{_ends(share)[1]:.0%} of the last groups have samples that all got the same reward",
        "zero_std",
        f"The prompts have become too {'easy' if too_easy else 'hard'}: choose others, or sample more per prompt.",
    )  # fmt: skip


def truncation(run: Run) -> Finding | None:
    """Many answers end at the length limit."""
    share = _metric(run, "rollout/truncated_ratio")
    if share.empty or _ends(share)[1] < 0.1:
        return None
    return Finding(
        "truncation", WARNING,
        f"{_ends(share)[1]:.0%} of the last samples were cut off by the length limit",
        "response_lengths",
        "Raise --rollout-max-response-len, or make short answers worth more; a cut-off answer earns nothing.",
    )  # fmt: skip


def failures(run: Run) -> Finding | None:
    """Samples whose generation or reward failed."""
    failed = run.samples[run.samples["status"] == "failed"]
    if len(failed) < 0.001 * max(len(run.samples), 1) or failed.empty:
        return None
    reason = failed["failure"].str.split("\n").str[0].mode()  # below it is the traceback
    return Finding(
        "failed-samples", WARNING if len(failed) > 0.05 * len(run.samples) else NOTE,
        f"{len(failed)} of {len(run.samples)} samples failed, mostly: {reason.iloc[0] if len(reason) else 'unknown'}",
        "reward_curve",
        "Read `failure` of these samples; a reward that times out needs more --reward-timeout or less work.",
    )  # fmt: skip


def stale_weights(run: Run) -> Finding | None:
    """Samples come from weights that are many updates old."""
    if run.samples.empty:
        return None
    age = metrics.staleness(run)["mean"].dropna()
    if age.empty or _ends(age)[1] < 2:
        return None
    return Finding(
        "stale-weights", WARNING,
        f"the last samples were generated {_ends(age)[1]:.1f} updates before they were trained on",
        "staleness",
        "Sync weights more often (--update-weights-interval), or use an off-policy correction.",
    )  # fmt: skip


def idle_roles(run: Run) -> Finding | None:
    """Trainers wait for engines, or the other way round, on GPUs of their own."""
    if run.config.get("train", {}).get("colocate", True):
        return None
    seconds = phase_seconds(run.steps).sum()
    total = seconds.sum()
    if not total:
        return None
    generate, train = seconds["generate"] / total, seconds["train"] / total
    if max(generate, train) < 0.7:
        return None
    idle, busy, share = ("trainer", "engine", generate) if generate > train else ("engine", "trainer", train)
    return Finding(
        "idle-roles", NOTE,
        f"{share:.0%} of the time the {idle} GPUs wait for the {busy}s",
        "time_breakdown",
        f"Move GPUs from the {idle}s to the {busy}s, or share them with --colocate.",
    )  # fmt: skip


def kl_spike_after_resume(run: Run) -> Finding | None:
    """The first step of a later attempt moves the policy far more than others do."""
    kl = _metric(run, "train/ppo_kl").abs()
    trained = run.steps[run.steps["step"] >= 0]
    first = trained.groupby("attempt")["step"].min().iloc[1:]
    usual = float(kl.median()) if len(kl) else 0.0
    spikes = [(step, kl[step]) for step in first if step in kl.index and kl[step] > max(10 * usual, 1e-3)]
    if not spikes:
        return None
    step, value = spikes[0]
    return Finding(
        "kl-spike-after-resume", ERROR,
        f"train/ppo_kl is {value:.2g} in step {step}, the first after a restart, and {usual:.2g} usually",
        "policy_kl",
        "Check that optimizer state and weights come from the same checkpoint, and that the engines have its weights.",
    )  # fmt: skip


def steps_lost(run: Run) -> Finding | None:
    """Work done twice because an attempt ended between two checkpoints."""
    lost = metrics.lost_steps(run)
    if lost.empty:
        return None
    return Finding(
        "lost-steps", NOTE if len(lost) <= 2 else WARNING,
        f"{len(lost)} steps ({lost['perf/step_s'].sum():.0f} s) were lost and trained again",
        "time_breakdown",
        "Save more often (--save-interval), or give the job more time to save when it is told to stop.",
    )  # fmt: skip


def failed_run(run: Run) -> Finding | None:
    """The last attempt ended in a failure."""
    if run.attempts.empty or run.attempts["state"].iloc[-1] != "FAILED":
        return None
    return Finding(
        "failed-run", ERROR,
        f"attempt {run.attempts['attempt'].iloc[-1]} failed: {run.attempts['reason'].iloc[-1]}",
        "reward_curve",
        "Read the log of the role that died (python -m hpc.logs) and the event `role_died`.",
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


CHECKS: list[Callable[[Run], Finding | None]] = [
    mismatch_drift, reward_hacking, entropy_collapse, zero_std_groups, truncation, failures, stale_weights, idle_roles,
    kl_spike_after_resume, steps_lost, failed_run, not_finite,
]  # fmt: skip


def examine(run: Run) -> Findings:
    """Run every check."""
    return Findings(run.name, [finding for check in CHECKS if (finding := check(run)) is not None])


def _metric(run: Run, name: str) -> pd.Series:
    """The recorded values of a metric by step."""
    if name not in run.steps:
        return pd.Series(dtype="float64")
    return run.steps.set_index("step")[name].dropna()


def _ends(values: pd.Series) -> tuple[float, float]:
    """Means of the first and the last sixth."""
    part = max(1, len(values) // 6)
    return float(values.iloc[:part].mean()), float(values.iloc[-part:].mean())


def _eval_names(run: Run) -> Iterator[str]:
    return (str(name) for name in run.steps if str(name).startswith("eval/") and str(name).count("/") == 1)
