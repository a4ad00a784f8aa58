"""Losses, token by token: of the policy, of the critic, and the KL term to a reference. torch.

Policy losses are clipped (PPO, GRPO, DAPO), by whole sequences (GSPO), or CISPO.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLLossType = Literal["k1", "k2", "k3", "low_var_kl"]

_LOW_VAR_LIMIT = 10.0  # slime's bound for low_var_kl: one token must not dominate the loss


class PolicyLoss(NamedTuple):
    """Per-token values, all of the shape of the log-probs."""

    loss: Tensor
    clipped: Tensor  # 1.0 where the clip took the token's gradient away, else 0.0


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    eps_clip: float,
    eps_clip_high: float,
    eps_clip_c: float | None = None,
) -> PolicyLoss:
    """max(−A·r, −A·clip(r, 1 − eps_clip, 1 + eps_clip_high)) with r = exp(log π − log π_old), token by token.

    PPO (https://arxiv.org/abs/1707.06347, eq. 7), with DAPO's wider upper clip ("clip-higher",
    https://arxiv.org/abs/2503.14476) and the dual clip for negative advantages
    (https://arxiv.org/abs/1912.09729, eq. 5).

    Args:
        log_probs: log π of the sampled tokens, shape [n]; gradients flow through it.
        old_log_probs: log π_old of the same tokens, shape [n].
        advantages: A of each token, shape [n].
        eps_clip_c: Dual clip: where A < 0 the loss is at most −c·A (c > 1).
    """
    ratio = (log_probs - old_log_probs).exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - eps_clip, 1 + eps_clip_high)
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if eps_clip_c is not None:
        ceiling = -advantages * eps_clip_c
        dual = (advantages < 0) & (loss > ceiling)
        loss = torch.where(dual, ceiling, loss)
        clipped = clipped | dual
    return PolicyLoss(loss, clipped.to(loss.dtype))


def cispo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, eps_clip: float, eps_clip_high: float
) -> PolicyLoss:
    """−sg(clip(r, 1 − eps_clip, 1 + eps_clip_high))·A·log π: the ratio is clipped, and no token loses its gradient.

    MiniMax-M1 (https://arxiv.org/abs/2506.13585, eq. 4), which leaves the lower clip off (`eps_clip=1`).
    Arguments as for `clipped_policy_loss`; `clipped` is 1.0 where the ratio was changed.
    """
    ratio = (log_probs.detach() - old_log_probs).exp()
    bounded = ratio.clamp(1 - eps_clip, 1 + eps_clip_high)
    return PolicyLoss(-bounded * advantages * log_probs, (bounded != ratio).to(log_probs.dtype))


def sequence_log_ratio(log_probs: Tensor, old_log_probs: Tensor, counts: Tensor) -> Tensor:
    """Each token's log-ratio replaced by the mean over its sequence, so that the ratio is s of GSPO.

    GSPO (https://arxiv.org/abs/2507.18071, eq. 7). The gradient of a sequence is spread over all its tokens;
    summed with equal token weights it is the one of the paper.

    Args:
        log_probs: log π of the sampled tokens of several sequences, one after the other, [n].
        old_log_probs: log π_old of the same tokens, [n].
        counts: Tokens of each sequence, [sequences], summing to n.

    Returns:
        [n].
    """
    return _sequence_mean(log_probs - old_log_probs, counts)


def off_policy_sequence_mask(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, counts: Tensor, *, delta: float
) -> Tensor:
    """0 for tokens with A < 0 of sequences that π_old finds more likely than π by more than delta, else 1. [n].

    DeepSeek-V3.2 (https://arxiv.org/abs/2512.02556, section 3.1): what the policy would hardly write any more
    teaches nothing about what to avoid. Sequences are compared by their mean of log π_old − log π.

    Args:
        log_probs: As for `sequence_log_ratio`, and so are `old_log_probs` and `counts`.
        advantages: A of each token, [n].
    """
    distance = _sequence_mean(old_log_probs - log_probs, counts)
    return 1 - ((advantages < 0) & (distance > delta)).to(log_probs.dtype)


def _sequence_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Each token's value replaced by the mean over its sequence, [n]."""
    sequence = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    sums = values.new_zeros(len(counts)).index_add(0, sequence, values)
    return (sums / counts.clamp_min(1))[sequence]


class ValueLoss(NamedTuple):
    """Per-token values, all of the shape of the predictions."""

    loss: Tensor
    clipped: Tensor  # 1.0 where the prediction has moved by more than the clip, else 0.0


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip: float
) -> ValueLoss:
    """max((V − G)², (V_old + clip(V − V_old, ±value_clip) − G)²), token by token.

    The value clip of PPO's reference implementation (https://arxiv.org/abs/2005.12729, section 3): the critic
    gains nothing from moving further than the clip in one rollout. Without a factor ½, as slime.

    Args:
        values: V of the critic that is trained, [n]; gradients flow through it.
        old_values: V before the first optimizer step on this rollout, [n].
        returns: G, [n].
    """
    moved = values - old_values
    bounded = old_values + moved.clamp(-value_clip, value_clip)
    loss = torch.maximum((values - returns).square(), (bounded - returns).square())
    return ValueLoss(loss, (moved.abs() > value_clip).to(loss.dtype))


def explained_variance(error: tuple[float, float, float], target: tuple[float, float, float]) -> float:
    """1 − Var(G − V) / Var(G): 1 is a perfect prediction, 0 is what a constant gives.

    Args:
        error: Number, sum and sum of squares of G − V.
        target: The same of G. Sums add up over ranks, which is why they are taken.

    Returns:
        0 where all targets are equal.
    """
    variance = _variance(*target)
    return 1.0 - _variance(*error) / variance if variance > 0 else 0.0


def _variance(count: float, total: float, squares: float) -> float:
    mean = total / max(1.0, count)
    return max(0.0, squares / max(1.0, count) - mean * mean)


def approximate_kl(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    kl_loss_type: KLLossType,
    importance_ratio: Tensor | None = None,
) -> Tensor:
    """KL estimate of each token, from log-probs of the tokens that the policy sampled.

    J. Schulman, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html), with
    `delta = log π_ref − log π`. All have expectation KL(π ‖ π_ref) or, for k2, come close to it.

    Args:
        log_probs: log π of the sampled tokens, any shape; gradients flow through it.
        ref_log_probs: log π_ref of the same tokens, same shape.
        kl_loss_type: `k1` unbiased, may be negative; `k2` ½·delta²; `k3` unbiased and never negative (the
            term of GRPO, https://arxiv.org/abs/2402.03300 eq. 4); `low_var_kl` is k3 clamped to ±10.
        importance_ratio: π / π_old, same shape, with its gradient: weighs the estimate, which makes it and its
            gradient unbiased for tokens that π_old sampled (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556).

    Raises:
        ValueError: unknown `kl_loss_type`.
    """
    delta = ref_log_probs - log_probs
    match kl_loss_type:
        case "k1":
            kl = -delta
        case "k2":
            kl = 0.5 * delta.square()
        case "k3" | "low_var_kl":
            kl = torch.expm1(delta) - delta
        case _:
            raise ValueError(f"unknown KL estimator {kl_loss_type!r}")
    if importance_ratio is not None:
        kl = importance_ratio * kl
    return kl.clamp(-_LOW_VAR_LIMIT, _LOW_VAR_LIMIT) if kl_loss_type == "low_var_kl" else kl
