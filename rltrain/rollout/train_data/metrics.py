"""Numbers about a batch or an evaluation: rewards, lengths, avg@k, unbiased pass@k, majority vote. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from rltrain.rewards.text import after_answer, last_boxed, normalize_math
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
    metrics |= reward_latency(samples) | engine_shares(samples)
    graded = [reward for reward in of_rollouts if reward is not None]
    if graded:
        metrics["rollout/reward"] = _mean(graded)
    if comparable:
        metrics["rollout/zero_std_ratio"] = _mean([min(group) == max(group) for group in comparable])
    return metrics


def category_metrics(key: str, samples: Sequence[Sample]) -> dict[str, float]:
    """`rollout/error_cat/VALUE`: the share of the samples whose dict reward has this value under `key`."""
    found = Counter(
        str(sample.reward[key])
        for sample in samples
        if isinstance(sample.reward, dict) and key in sample.reward
    )
    return {f"rollout/error_cat/{value}": count / len(samples) for value, count in sorted(found.items())}


def correct_metrics(samples: Sequence[Sample], rewards: Sequence[float | None]) -> dict[str, float]:
    """The share of responses with a reward of at least 1, and their lengths in tokens: mean, quartiles and largest."""
    right = [reward is not None and reward >= _SOLVED for reward in rewards]
    lengths = sorted(sample.response_length for sample, each in zip(samples, right, strict=True) if each)
    metrics = {"rollout/correct_ratio": len(lengths) / max(1, len(samples))}
    if not lengths:
        return metrics
    metrics["rollout/correct_response_length"] = _mean(lengths)
    for percent in (25, 50, 75, 100):
        place = math.ceil(percent / 100 * len(lengths)) - 1
        metrics[f"rollout/correct_response_length_p{percent}"] = float(lengths[place])
    return metrics


def engine_shares(samples: Sequence[Sample]) -> dict[str, float]:
    """Share of the prompt tokens that engines had in their caches, and of drafted tokens that were accepted."""
    metrics = {}
    cached = Sample.PrefixCacheInfo()
    guessed = Sample.SpecInfo()
    for sample in samples:
        for total, own in ((cached, sample.prefix_cache_info), (guessed, sample.spec_info)):
            for name, value in vars(own).items():
                setattr(total, name, getattr(total, name) + value)
    if cached.total_prompt_tokens:
        metrics["rollout/prefix_cache_hit_rate"] = cached.prefix_cache_hit_rate
    if guessed.spec_verify_ct:
        metrics["rollout/spec_accept_rate"] = guessed.spec_accept_rate
        metrics["rollout/spec_accept_length"] = guessed.spec_accept_length
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


_SOLVED = 1.0  # a prompt counts as solved by a reward of at least this


def once_each(
    samples: Sequence[Sample], rewards: Sequence[float | None]
) -> tuple[list[Sample], list[float | None]]:
    """One sample a rollout, the last, with the mean reward of all that the rollout has; in their order."""
    rollouts: dict[Any, list[int]] = {}
    for i, sample in enumerate(samples):
        key = ("alone", i) if sample.rollout_id is None else sample.rollout_id
        rollouts.setdefault(key, []).append(i)
    graded = [[reward for i in own if (reward := rewards[i]) is not None] for own in rollouts.values()]
    return [samples[own[-1]] for own in rollouts.values()], [_mean(own) if own else None for own in graded]


def several_samples_metrics(
    name: str, samples: Sequence[Sample], rewards: Sequence[float]
) -> dict[str, float]:
    """`eval/<name>/avg@n`, `/pass@k` for k = 1, 2, 4 … n, and `/maj@n`; {} if a prompt has one sample only.

    n is the number of samples of the prompt that has fewest.
    """
    groups: dict[int | None, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[sample.group_index].append(i)
    n = min((len(members) for members in groups.values()), default=0)
    if n < 2 or None in groups:
        return {}
    metrics = {f"eval/{name}/avg@{n}": _mean([_mean([rewards[i] for i in g]) for g in groups.values()])}
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        solved = [(len(g), sum(rewards[i] >= _SOLVED for i in g)) for g in groups.values()]
        metrics[f"eval/{name}/pass@{k}"] = _mean([pass_at_k(total, right, k) for total, right in solved])
    votes = [
        majority_vote([final_answer(samples[i]) for i in g], [rewards[i] for i in g]) for g in groups.values()
    ]
    metrics[f"eval/{name}/maj@{n}"] = _mean(votes)
    return metrics


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from n samples, that at least one of k solves the prompt: 1 − C(n − c, k)/C(n, k).

    Codex (https://arxiv.org/abs/2107.03374, eq. 1).
    """
    if k > n:
        raise ValueError(f"pass@{k} needs {k} samples, but there are {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_vote(answers: Sequence[str], rewards: Sequence[float]) -> float:
    """The reward of the answer that most samples gave; of several such, of the one that came first.

    Self-consistency (https://arxiv.org/abs/2203.11171). A sample without an answer has no vote.
    """
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return 0.0
    winner = max(votes, key=lambda answer: votes[answer])  # of equals, the first
    return rewards[answers.index(winner)]


def final_answer(sample: Sample) -> str:
    """What a sample votes for: `pred` of a dict reward, or what is boxed, or after "Answer:", or all of it."""
    if sample.status is Sample.Status.FAILED:
        return ""
    if isinstance(sample.reward, dict) and "pred" in sample.reward:
        return str(sample.reward["pred"])
    text = sample.response
    found = last_boxed(text) or after_answer(text)
    return normalize_math(text.strip() if found is None else found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
