"""Attention where sequences share their beginnings: which queries see which keys, in how many calls.

Segments are packed one after the other (`rltrain.data.prefixes`). The last query of a segment sees some keys of other
segments, then its segment's own, and every query before it one key less. So keys and values are gathered once for all
segments, with those that are shared as often as they are seen, and then it is causal attention from the lower right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# On a CPU a family of so few tokens is one call with a mask: calls cost more than what it computes in vain.
_SMALL = 256


@dataclass(frozen=True)
class Call:
    """`count` segments of `queries` tokens each to `keys` keys each.

    Attributes:
        mask: [queries, keys] bool, of which query sees which key; None: causal from the lower right.
    """

    count: int
    queries: int
    keys: int
    mask: Tensor | None = None


def plan_calls(
    lengths: Sequence[int], keys: Sequence[NDArray[np.int64]], families: Sequence[int], *, masks: bool
) -> tuple[list[Call], NDArray[np.int64]]:
    """The calls over all segments, in their order, and the keys of all calls, one call's after the other's.

    Args:
        lengths: Tokens of each segment.
        keys: Which tokens the last one of each segment sees; its own are the last of them.
        families: Segments of each family: they lie together, and share keys with no other.
        masks: Whether small families become one call.
    """
    calls: list[Call] = []
    attended: list[NDArray[np.int64]] = []
    plain: list[tuple[int, int]] = []  # queries and keys of segments that have no call yet

    def finish() -> None:
        for (queries, seen), run in groupby(plain):
            calls.append(Call(len(list(run)), queries, seen))
        plain.clear()

    segment = start = 0
    for size in families:
        own = range(segment, segment + size)
        total = sum(lengths[i] for i in own)
        if masks and size > 1 and total <= _SMALL:
            finish()
            mask = _mask([lengths[i] for i in own], [keys[i] - start for i in own])
            calls.append(Call(1, total, total, torch.from_numpy(mask)))
            attended.append(np.arange(start, start + total))
        else:
            plain += [(lengths[i], len(keys[i])) for i in own]
            attended += [keys[i] for i in own]
        segment, start = segment + size, start + total
    finish()
    return calls, np.concatenate(attended)


def _mask(lengths: Sequence[int], keys: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    total = sum(lengths)
    mask = np.zeros((total, total), bool)
    start = 0
    for length, seen in zip(lengths, keys, strict=True):
        rows = slice(start, start + length)
        mask[rows, seen[: len(seen) - length]] = True
        mask[rows, rows] = np.tri(length, dtype=bool)
        start += length
    return mask


class _GatherKeys(torch.autograd.Function):
    """Rows of a tensor, some of them more than once; their gradients are added up in fp32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        total = gradient.new_zeros((ctx.count, *gradient.shape[1:]), dtype=torch.float32)
        return total.index_add_(0, index, gradient.float()).to(gradient.dtype), None


def gather_keys(key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [tokens, heads, head_dim] of these tokens."""
    both = _GatherKeys.apply(torch.cat([key, value], dim=-1), index)
    gathered_key, gathered_value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
    return gathered_key, gathered_value
