"""The critic's loss, and how well it predicts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
