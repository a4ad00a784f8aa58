"""Numbers about an evaluation with several samples a prompt: avg@k, unbiased pass@k, majority vote. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from rltrain.rewards.answers import after_answer, last_boxed, normalize_math
from rltrain.sample import Sample

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
        raise ValueError(f"pass@{k} needs {k} samples, and there are {n}")
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
    return sum(values) / len(values)
