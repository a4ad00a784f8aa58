"""Numbers about a batch of samples. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rltrain.rollout.eval_metrics import once_each, several_samples_metrics
from rltrain.sample import Sample


def batch_metrics(samples: Sequence[Sample], rewards: Sequence[float | None]) -> dict[str, float]:
    """Metrics `rollout/…` of a batch; `rewards` has None where the sample failed.

    `zero_std_ratio` is the share of the groups (of two or more graded samples) whose rewards are all equal,
    which nothing can be learned from; `tokens` are response tokens. In rewards a rollout of several samples
    counts once.
    """
    groups: dict[int | None, list[float]] = defaultdict(list)
    rollouts, of_rollouts = once_each(samples, rewards)
    for sample, reward in zip(rollouts, of_rollouts, strict=True):
        if reward is not None:
            groups[sample.group_index].append(reward)
    comparable = [group for group in groups.values() if len(group) > 1]
    lengths = [sample.response_length for sample in samples]
    metrics = {
        "rollout/response_length": _mean(lengths),
        "rollout/response_length_max": float(max(lengths)),
        "rollout/truncated_ratio": _mean([sample.status is Sample.Status.TRUNCATED for sample in samples]),
        "rollout/failed_ratio": _mean([sample.status is Sample.Status.FAILED for sample in samples]),
        "rollout/tokens": float(sum(lengths)),
    }
    metrics |= reward_latency(samples)
    graded = [reward for reward in of_rollouts if reward is not None]
    if graded:
        metrics["rollout/reward"] = _mean(graded)
    if comparable:
        metrics["rollout/zero_std_ratio"] = _mean([min(group) == max(group) for group in comparable])
    return metrics


def reward_latency(samples: Sequence[Sample]) -> dict[str, float]:
    """Seconds that a reward took, from when a process had it: mean, and nearly the slowest; {} without rewards."""
    seconds = sorted(sample.reward_seconds for sample in samples if sample.reward_seconds)
    if not seconds:
        return {}
    p99 = seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]
    return {"perf/reward_latency_mean": _mean(seconds), "perf/reward_latency_p99": p99}


def eval_metrics(name: str, samples: Sequence[Sample], rewards: Sequence[float]) -> dict[str, float]:
    """Metrics `eval/<name>` (mean reward) and `eval/<name>/…` of one evaluation set."""
    rollouts, of_rollouts = once_each(samples, rewards)
    scores = [reward or 0.0 for reward in of_rollouts]
    return several_samples_metrics(name, rollouts, scores) | {
        f"eval/{name}": _mean(scores),
        f"eval/{name}/response_length": _mean([sample.response_length for sample in samples]),
        f"eval/{name}/truncated_ratio": _mean(
            [sample.status is Sample.Status.TRUNCATED for sample in samples]
        ),
        f"eval/{name}/failed_ratio": _mean([sample.status is Sample.Status.FAILED for sample in samples]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
