"""Baselines from the group: how a reward compares with those of the other responses to the same prompt.

On plain Python floats, because the rollout side has no torch. Groups are given by index, so they may have any
size and order. A group of one, and a group whose rewards are all equal, says nothing about which response is
better: its samples get 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

_EPSILON = 1e-6


def normalize_rewards(
    rewards: Sequence[float],
    group_indices: Sequence[Hashable],
    *,
    std: bool = True,
    mask: Sequence[bool] | None = None,
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

    Returns:
        One advantage a sample, in the order of `rewards`.
    """
    return _per_group(rewards, group_indices, mask, lambda group: _normalize(group, std=std))


def leave_one_out(
    rewards: Sequence[float], group_indices: Sequence[Hashable], *, mask: Sequence[bool] | None = None
) -> list[float]:
    """R − mean of the group's other rewards: RLOO (https://arxiv.org/abs/2402.14740, section 2.2).

    Equals (R − mean)·n/(n − 1). Arguments and result as for `normalize_rewards`.
    """

    def centre(group: list[float]) -> list[float]:
        n = len(group)
        return [value * n / max(1, n - 1) for value in _normalize(group, std=False)]

    return _per_group(rewards, group_indices, mask, centre)


def _per_group(
    rewards: Sequence[float],
    group_indices: Sequence[Hashable],
    mask: Sequence[bool] | None,
    function: Callable[[list[float]], list[float]],
) -> list[float]:
    if len(group_indices) != len(rewards) or (mask is not None and len(mask) != len(rewards)):
        raise ValueError("rewards, group_indices and mask must have one entry a sample")
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, group in enumerate(group_indices):
        if mask is None or mask[i]:
            groups[group].append(i)
    result = [0.0] * len(rewards)
    for members in groups.values():
        for i, value in zip(members, function([rewards[i] for i in members]), strict=True):
            result[i] = value
    return result


def _normalize(rewards: list[float], *, std: bool) -> list[float]:
    # Equal rewards are told apart from almost equal ones by comparing, since rounding of the mean leaves
    # residues that the division by a tiny standard deviation would blow up.
    if all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not std:
        return centred
    deviation = math.sqrt(math.fsum(value * value for value in centred) / (len(rewards) - 1))
    return [value / (deviation + _EPSILON) for value in centred]
