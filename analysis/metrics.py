"""Numbers that no frame holds by itself: made from several frames of a run, one function each.

Every function takes a run (or a frame of it) and returns a frame or a number; none of them draws.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from analysis.frames.run import RunFrames
from analysis.frames.steps import metric, phase_seconds, trained

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


def reward_bands(samples: pd.DataFrame) -> pd.DataFrame:
    """Share of each step's samples by reward, a column a band: failed to be graded, ≤ 0, four quarters, ≥ 1."""
    edges = [-np.inf, 0.0, 0.25, 0.5, 0.75, np.nextafter(1.0, 0), np.inf]
    names = ["≤ 0", "0 to ¼", "¼ to ½", "½ to ¾", "¾ to 1", "≥ 1"]
    bands = pd.cut(samples["reward"], edges, labels=names).cat.add_categories("no reward").fillna("no reward")
    return pd.crosstab(samples["step"], bands, normalize="index", dropna=False)


def lengths(samples: pd.DataFrame) -> pd.DataFrame:
    """Response length by step in tokens: mean, quantiles (`q10` …), and the share of truncated samples."""
    grouped = samples.groupby("step")["response_length"]
    frame = pd.DataFrame({f"q{int(q * 100)}": grouped.quantile(q) for q in (0.1, 0.5, 0.9)})
    truncated = (samples["status"] == "truncated").groupby(samples["step"]).mean()
    return frame.assign(mean=grouped.mean(), truncated=truncated)


def pass_at_k_by_difficulty(
    run: RunFrames, key: str = "difficulty", *, threshold: float = 1.0
) -> pd.DataFrame:
    """Unbiased pass@k by difficulty and step, with the number of groups.

    Args:
        key: entry of the prompts' metadata that tells the difficulty.
        threshold: a sample is correct if its reward is at least this.
    """
    rows = run.read_samples(["metadata"]).drop_duplicates(["step", "group_index"])
    level = [
        json.loads(text).get(key) if isinstance(text, str) and text else None for text in rows["metadata"]
    ]
    groups = run.read_groups(threshold=threshold)
    groups = groups.merge(
        rows.assign(difficulty=pd.Series(level, index=rows.index))[["step", "group_index", "difficulty"]]
    )
    columns = [name for name in groups if str(name).startswith("pass@")]
    table = groups.groupby(["difficulty", "step"])
    return table[columns].mean().assign(groups=table.size())


def reward_range(run: RunFrames) -> tuple[float, float]:
    """The lowest and the highest reward of a training sample; without samples, of a step's mean; NaN without either."""
    rewards = run.samples["reward"].dropna()
    if rewards.empty:
        rewards = metric(run.steps, "rollout/reward")
    return (float(rewards.min()), float(rewards.max())) if len(rewards) else (np.nan, np.nan)


def zero_std_share(groups: pd.DataFrame) -> pd.Series:
    """Share of each step's groups whose samples all got the same reward: they teach nothing."""
    return groups.groupby("step")["zero_std"].mean()


def advantages(samples: pd.DataFrame) -> pd.DataFrame:
    """By step: `mean`, `std`, `min`, `max` of the normalised rewards that the advantages are made of, and `zero`, the
    share of samples where it is 0: they teach nothing."""
    grouped = samples.groupby("step")["train_reward"]
    frame = grouped.agg(["mean", "std", "min", "max"])
    return frame.assign(zero=(samples["train_reward"] == 0).groupby(samples["step"]).mean())


def recorded_steps(run: RunFrames, most: int) -> list[int]:
    """Steps whose tokens the trainer has recorded: at most `most` of them, evenly from the first to the last."""
    layout = run.layout
    samples = layout.sample_files() if layout else {}
    steps = [step for step in (layout.trainer_files() if layout else {}) if step in samples]
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    return [steps[i] for i in chosen]


def token_quantiles(run: RunFrames, steps: int | list[int] | None = None) -> pd.DataFrame:
    """Quantiles by step over the trained tokens: `gap` (trainer - engine) and `abs_gap` in nats, `ratio` exp(gap),
    and `entropy` in nats.

    Steps whose trainer log-probs were not recorded are missing.
    """
    columns = ["loss_mask", "rollout_log_probs", "trainer_log_probs", "trainer_entropies"]
    rows = []
    for step, samples in run.read_samples(columns, steps).groupby("step"):
        recorded = samples[samples["trainer_log_probs"].notna() & samples["rollout_log_probs"].notna()]
        if recorded.empty:
            continue
        mask = np.concatenate(recorded["loss_mask"].tolist()).astype(bool)
        gap = _flat(recorded["trainer_log_probs"])[mask] - _flat(recorded["rollout_log_probs"])[mask]
        values = {"gap": gap, "abs_gap": np.abs(gap), "ratio": np.exp(gap)}
        if recorded["trainer_entropies"].notna().all():
            values["entropy"] = _flat(recorded["trainer_entropies"])[mask]
        row: dict[str, Any] = {"step": step, "tokens": int(mask.sum())}
        for name, numbers in values.items():
            if len(numbers):
                found = np.quantile(numbers, QUANTILES)
                row |= {
                    f"{name}_q{int(q * 100):02}": value for q, value in zip(QUANTILES, found, strict=True)
                }
        rows.append(row)
    return pd.DataFrame(rows, columns=None if rows else ["step", "tokens"]).set_index("step")


def staleness(run: RunFrames, steps: int | Iterable[int] | None = None) -> pd.DataFrame:
    """By step, how many updates the weights that generated it were behind: mean, largest, share of mixed samples."""
    samples = run.read_samples(["weight_versions"], steps)
    # Other tools write versions that are not numbers: they count as not recorded.
    exploded = pd.to_numeric(samples["weight_versions"].explode(), errors="coerce").astype("float64")
    age = (samples["step"].reindex(exploded.index) - exploded).groupby(level=0)
    mixed = samples["weight_versions"].map(lambda versions: len(set(versions)) > 1)
    frame = pd.DataFrame({"step": samples["step"], "mean": age.mean(), "max": age.max(), "mixed": mixed})
    return frame.groupby("step").agg({"mean": "mean", "max": "max", "mixed": "mean"})


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams of words that have occurred in it before: 0 (none) to nearly 1."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def time_breakdown(run: RunFrames) -> pd.DataFrame:
    """Wall seconds of each step by phase (see `analysis.frames.steps.phase_seconds`) and their share of all steps."""
    seconds = phase_seconds(run.steps).sum()
    return pd.DataFrame({"seconds": seconds, "share": seconds / max(seconds.sum(), 1e-12)})


def tokens_per_gpu_second(run: RunFrames) -> pd.Series:
    """Response tokens per second of a step's wall time and GPU, by step."""
    steps = trained(run.steps).set_index("step")
    if "rollout/tokens" not in steps or "perf/step_s" not in steps:
        return pd.Series(dtype="float64")
    return steps["rollout/tokens"] / steps["perf/step_s"] / max(run.gpus, 1)


def lost_steps(run: RunFrames) -> pd.DataFrame:
    """Steps that were trained, lost when an attempt ended before its next checkpoint, and trained again."""
    every = run.read_steps(every_attempt=True)
    tried = trained(every)
    lost = tried[tried.duplicated("step", keep="last")]
    columns = ["step", "attempt", "perf/step_s"]
    return lost.reindex(columns=columns).reset_index(drop=True)


def cost(run: RunFrames, attempts: pd.DataFrame | None = None) -> dict[str, float]:
    """The cost of a run, and what came of it.

    `allocated_gpu_hours`, `productive_gpu_hours` (in steps that were kept), `goodput` (their ratio),
    `lost_steps`, `lost_gpu_hours`, `queue_wait_s`, `reward_gain` (mean of the last tenth of the steps less the
    first's), `gpu_hours_per_reward_point`. A number that cannot be known is missing (NaN).

    Args:
        attempts: `run.read_attempts()` for Slurm's numbers; default: those made from the run's events.
    """
    attempts = run.attempts if attempts is None else attempts
    gpus = run.gpus
    steps = trained(run.steps)
    seconds = float(steps["perf/step_s"].sum()) if "perf/step_s" in steps else np.nan
    lost = lost_steps(run)
    allocated = float(attempts["gpu_hours"].sum()) if len(attempts) else np.nan
    productive = gpus * seconds / 3600
    gain = _reward_gain(steps)
    return {
        "allocated_gpu_hours": allocated,
        "productive_gpu_hours": productive,
        "goodput": productive / allocated if allocated else np.nan,
        "lost_steps": float(len(lost)),
        "lost_gpu_hours": gpus * float(lost["perf/step_s"].sum()) / 3600,
        # Components of one heterogeneous job wait together.
        "queue_wait_s": float(attempts.drop_duplicates(["job_id", "attempt"])["wait_s"].sum()),
        "reward_gain": gain,
        "gpu_hours_per_reward_point": allocated / gain if gain > 0 else np.nan,
    }


def _reward_gain(steps: pd.DataFrame) -> float:
    rewards = metric(steps, "rollout/reward")
    if len(rewards) < 2:
        return np.nan
    tenth = max(1, len(rewards) // 10)
    return float(rewards.iloc[-tenth:].mean() - rewards.iloc[:tenth].mean())


def _flat(lists: pd.Series) -> np.ndarray:
    return np.concatenate(lists.tolist()).astype("float64")
