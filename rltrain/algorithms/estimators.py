"""Advantage estimators: from a response's reward to a number for each of its tokens. NumPy.

Discounted returns with a KL penalty (REINFORCE++), generalized advantages from a critic's values (PPO), a teacher's
grade on top (distillation), and whitening over a batch. `rltrain.megatron.training.advantages` calls them. Baselines
from the group are in `rltrain.algorithms.grpo`, for the rollout side.


Arrays hold the tokens that are trained on, and nothing else: the text of a tool is not an action of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


def with_kl_penalty(advantage: float | NDArray[np.float64], kl: Floats, *, kl_coef: float) -> Floats:
    """advantage − kl_coef·kl_t: REINFORCE++-baseline, where the group's mean is the baseline. Shape [n].

    Args:
        advantage: Of the response, or of each token.
    """
    return (advantage - kl_coef * kl.astype(np.float64)).astype(np.float32)


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
        raise ValueError("one value per token is needed, as many as rewards")
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


def reverse_kl(log_probs: Floats, teacher_log_probs: Floats) -> Floats:
    """log π_student − log π_teacher of each sampled token: its expectation is KL(student ‖ teacher). [n].

    MiniLLM (https://arxiv.org/abs/2306.08543, section 2.1), estimated on the student's samples.
    """
    return log_probs - teacher_log_probs


def with_distillation(advantages: Floats, reverse_kls: Floats, *, opd_kl_coef: float) -> Floats:
    """A_t − opd_kl_coef·(log π_student − log π_teacher)_t, token by token, without a discount. [n].

    On-policy distillation (https://thinkingmachines.ai/blog/on-policy-distillation): with A = 0 it is
    distillation alone, otherwise the teacher's grade is added to the estimator's.
    """
    return (advantages - opd_kl_coef * reverse_kls.astype(np.float64)).astype(np.float32)


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
