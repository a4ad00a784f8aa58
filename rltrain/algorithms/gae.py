"""Advantages from a critic's values: generalized advantage estimation. NumPy.

Arrays hold the tokens that are trained on, and nothing else: what a tool wrote is no action of the policy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def token_rewards(reward: float, kl: Floats, *, kl_coef: float) -> Floats:
    """−kl_coef·kl_t for each token, and the response's reward on the last one.

    Ziegler et al. (https://arxiv.org/abs/1909.08593, eq. 2), token by token. Shape [n].

    Args:
        reward: Of the whole response.
        kl: KL estimate of each of its tokens, [n]; zeros without a penalty.
    """
    rewards = -kl_coef * kl.astype(np.float64)
    if len(rewards):
        rewards[-1] += reward
    return rewards.astype(np.float32)


def generalized_advantages(
    rewards: Sequence[Floats], values: Sequence[Floats], *, gamma: float, lambd: float
) -> tuple[list[Floats], list[Floats]]:
    """A_t = δ_t + γλ·A_{t+1} with δ_t = r_t + γ·V_{t+1} − V_t, where nothing follows the last token.

    GAE (https://arxiv.org/abs/1506.02438, eq. 16). All responses are gone through at once, from their ends.

    Args:
        rewards: One array a response, [n_i].
        values: V of the state before each token, in the same shapes.

    Returns:
        Advantages and returns A + V, which the critic is trained to predict; shapes as given.

    Raises:
        ValueError: a response has another number of values than of rewards.
    """
    lengths = [len(each) for each in rewards]
    if lengths != [len(each) for each in values]:
        raise ValueError("one value a token is needed, as many as rewards")
    longest = max(lengths, default=0)
    padded_rewards, padded_values = (_align_ends(each, longest) for each in (rewards, values))
    advantages = np.zeros((len(lengths), longest))
    following = following_value = np.zeros(len(lengths))
    for t in range(longest - 1, -1, -1):
        delta = padded_rewards[:, t] + gamma * following_value - padded_values[:, t]
        following = delta + gamma * lambd * following
        advantages[:, t], following_value = following, padded_values[:, t]
    own = [row[longest - n :] for row, n in zip(advantages, lengths, strict=True)]
    returns = [(a + v).astype(np.float32) for a, v in zip(own, values, strict=True)]
    return [each.astype(np.float32) for each in own], returns


def _align_ends(arrays: Sequence[Floats], length: int) -> NDArray[np.float64]:
    """[responses, length], zeros in front of shorter ones, which nothing looks back at."""
    padded = np.zeros((len(arrays), length))
    for row, array in zip(padded, arrays, strict=True):
        row[length - len(array) :] = array
    return padded
