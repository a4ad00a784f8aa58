"""Soft caps, x → c · tanh(x / c), of logits and of attention's scores, as in Gemma 2: https://arxiv.org/abs/2408.00118."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

_CHUNK = 2**24  # logits whose fp32 copies exist at a time


class _SoftCap(torch.autograd.Function):
    """In place: logits are the largest tensor there is, and the loss keeps them anyway."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cap: float) -> Tensor:
        for part in _chunks(logits):
            part.copy_(part.float().div_(cap).tanh_().mul_(cap))
        ctx.mark_dirty(logits)
        ctx.save_for_backward(logits)
        ctx.cap = cap
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        result = torch.empty_like(gradient)
        for own, part, out in zip(_chunks(gradient), _chunks(logits), _chunks(result), strict=True):
            out.copy_(own * (1 - (part.float() / ctx.cap).square_()))
        return result, None


def _chunks(logits: Tensor) -> tuple[Tensor, ...]:
    rows = logits.flatten(0, -2)  # a view: no dimension before the last is strided
    return rows.split(max(1, _CHUNK // rows.shape[-1]))


def soft_capped_(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap), in place and rounded once, [..., vocabulary of this rank]."""
    capped: Tensor = _SoftCap.apply(logits, cap)
    return capped


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, cap: float
) -> Tensor:
    """Attention with scores of cap · tanh(score / cap), computed in fp32; scores are not kept for the backward pass.

    Args:
        q: [sequences, heads, queries, head_dim].
        k, v: [sequences, heads of keys, keys, head_dim].
        mask: Which query sees which key, [queries, keys] bool.
        scale: Of the scores; None: 1 / √head_dim.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    output: Tensor = checkpoint(
        _capped, q, k, v, mask, scale, cap, use_reentrant=False, preserve_rng_state=False
    )
    return output


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    shared = q.unflatten(1, (k.shape[1], -1)).float()  # queries of heads that share keys lie together
    scores = (shared @ k.float().unsqueeze(2).mT) * scale
    scores = (torch.tanh(scores / cap) * cap).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v.float().unsqueeze(2)).flatten(1, 2).to(q.dtype)
