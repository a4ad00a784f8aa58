"""Baselines from the group: how a reward compares with the other responses' rewards for the same prompt.

On plain Python floats, because the rollout side has no torch. Groups are given by index, so they may have any
size and order. A group of one rollout, and a group whose rewards are all equal, says nothing about which response is
better: its samples get 0.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

_EPSILON = 1e-6


def normalize_rewards(
    rewards: Sequence[float],
    group_indices: Sequence[Hashable],
    *,
    std: bool = True,
    mask: Sequence[bool] | None = None,
    rollout_ids: Sequence[Hashable] | None = None,
) -> list[float]:
    """(R − mean) / (std + 1e-6) within each group, or R − mean with `std=False`.

    DeepSeekMath (https://arxiv.org/abs/2402.03300), section 4.1; without the standard deviation it is the
    advantage of Dr. GRPO (https://arxiv.org/abs/2503.20783), and the one that REINFORCE++-baseline
    (https://arxiv.org/abs/2501.03262) whitens over the batch. The standard deviation is the unbiased one
    (divisor n − 1).

    Args:
        rewards: One scalar a sample.
        group_indices: The sample's group, one a sample.
        std: Divide by the group's standard deviation.
        mask: Where False the sample (one that failed) is left out of its group's statistics and gets 0.
        rollout_ids: Samples that share one were one rollout, which counts once in its group's statistics, however
            many samples it has; None: every sample is its own.

    Returns:
        One advantage a sample, in the order of `rewards`.
    """
    return _per_group(
        rewards, group_indices, mask, rollout_ids, lambda group, of: _normalize(group, of, std=std)
    )


def leave_one_out(
    rewards: Sequence[float],
    group_indices: Sequence[Hashable],
    *,
    mask: Sequence[bool] | None = None,
    rollout_ids: Sequence[Hashable] | None = None,
) -> list[float]:
    """R − mean of the group's other rollouts: RLOO (https://arxiv.org/abs/2402.14740, section 2.2).

    Equals (R − mean)·n/(n − 1) for n rollouts. Arguments and result as for `normalize_rewards`.
    """

    def centre(group: list[float], of: list[Hashable]) -> list[float]:
        n = len(set(of))
        if n == 1 or all(reward == group[0] for reward in group):
            return [0.0] * len(group)
        means = _rollout_means(group, of)
        total = math.fsum(means.values())
        return [reward - (total - means[own]) / (n - 1) for reward, own in zip(group, of, strict=True)]

    return _per_group(rewards, group_indices, mask, rollout_ids, centre)


def _per_group(
    rewards: Sequence[float],
    group_indices: Sequence[Hashable],
    mask: Sequence[bool] | None,
    rollout_ids: Sequence[Hashable] | None,
    function: Callable[[list[float], list[Hashable]], list[float]],
) -> list[float]:
    of: Sequence[Hashable] = range(len(rewards)) if rollout_ids is None else rollout_ids
    if any(each is not None and len(each) != len(rewards) for each in (group_indices, mask, of)):
        raise ValueError("rewards, group_indices, mask and rollout_ids must have one entry per sample")
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, group in enumerate(group_indices):
        if mask is None or mask[i]:
            groups[group].append(i)
    result = [0.0] * len(rewards)
    for members in groups.values():
        values = function([rewards[i] for i in members], [of[i] for i in members])
        for i, value in zip(members, values, strict=True):
            result[i] = value
    return result


def _rollout_means(rewards: list[float], of: list[Hashable]) -> dict[Hashable, float]:
    """The mean reward of each rollout's samples."""
    by_rollout: dict[Hashable, list[float]] = defaultdict(list)
    for reward, own in zip(rewards, of, strict=True):
        by_rollout[own].append(reward)
    return {own: math.fsum(values) / len(values) for own, values in by_rollout.items()}


def _normalize(rewards: list[float], of: list[Hashable], *, std: bool) -> list[float]:
    # Equal rewards are told apart from almost equal ones by comparing, since rounding of the mean leaves
    # residues that the division by a tiny standard deviation would blow up.
    samples = Counter(of)
    n = len(samples)
    if n == 1 or all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(reward / samples[own] for reward, own in zip(rewards, of, strict=True)) / n
    centred = [reward - mean for reward in rewards]
    if not std:
        return centred
    squares = (value * value / samples[own] for value, own in zip(centred, of, strict=True))
    deviation = math.sqrt(math.fsum(squares) / (n - 1))
    return [value / (deviation + _EPSILON) for value in centred]
