"""Advantages of single tokens: discounted returns with a KL penalty, and whitening over a batch. NumPy.

Arrays hold the tokens that are trained on, and nothing else: what a tool wrote is no action of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_EPSILON = 1e-8


def discounted_returns(reward: float, kl: Floats, *, kl_coef: float, gamma: float) -> Floats:
    """G_t = r_t + gamma·G_{t+1}, where r_t = −kl_coef·kl_t, and the last token also has the reward.

    REINFORCE++ (https://arxiv.org/abs/2501.03262, eq. 3 and 4).

    Args:
        reward: Of the whole response.
        kl: KL estimate of each token of one response, [n]; zeros without a penalty.

    Returns:
        [n].
    """
    returns = -kl_coef * kl.astype(np.float64)
    if len(returns):
        returns[-1] += reward
    for t in range(len(returns) - 2, -1, -1):
        returns[t] += gamma * returns[t + 1]
    return returns.astype(np.float32)


def with_kl_penalty(advantage: float, kl: Floats, *, kl_coef: float) -> Floats:
    """advantage − kl_coef·kl_t: REINFORCE++-baseline, where the group's mean is the baseline. Shape [n]."""
    return (advantage - kl_coef * kl.astype(np.float64)).astype(np.float32)


def whiten(
    values: list[Floats], all_reduce: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> list[Floats]:
    """(x − mean) / √(var + 1e-8) over every token of every rank; var with divisor n − 1.

    The mean is taken off before squares are summed, so that large values lose no digits.

    Args:
        values: This rank's tokens, one array a sample; may be none at all.
        all_reduce: Sums an array over the ranks.
    """
    own = np.concatenate([np.empty(0), *values]).astype(np.float64)
    count, total = all_reduce(np.array([len(own), own.sum()]))
    if count < 2:
        return [np.zeros_like(each) for each in values]
    mean = total / count
    (squares,) = all_reduce(np.array([np.square(own - mean).sum()]))
    scale = 1.0 / math.sqrt(squares / (count - 1) + _EPSILON)
    return [((each - mean) * scale).astype(np.float32) for each in values]
