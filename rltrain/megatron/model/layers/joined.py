"""Attention of short sequences on a CPU: neighbours of about the same length are one call, padded at their ends.

A call for a sequence of a few tokens takes many times what it computes. Causal attention hides the padding from every
token before it, so nothing that is read, and no gradient, depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SHORT = 128  # tokens; a call for longer ones computes for longer than it takes otherwise
_LONGER = 4  # the longest of a call is this part longer than the first one, and
_MORE = 4  # these tokens


@dataclass(frozen=True)
class Joined:
    """The short sequences with which a micro-batch begins.

    Attributes:
        sequences: How many they are.
        tokens: t, of all of them.
        calls: Of each call: its sequences, and the tokens that each of them is padded to.
        places: [t] int64: where the tokens are among those of all calls, one call's after the other's.
    """

    sequences: int
    tokens: int
    calls: tuple[tuple[int, int], ...]
    places: Tensor

    @property
    def longest(self) -> int:
        """Tokens of a sequence of theirs, at most."""
        return max(longest for _, longest in self.calls)


def join(lengths: Sequence[int]) -> Joined | None:
    """The calls for sequences of these lengths, which are best sorted; None where they would be as many as before."""
    short = next((i for i, length in enumerate(lengths) if length > _SHORT), len(lengths))
    calls: list[list[int]] = []
    for length in lengths[:short]:
        if calls and calls[-1][0] <= length <= calls[-1][0] * (1 + 1 / _LONGER) + _MORE:
            calls[-1].append(length)
        else:
            calls.append([length])
    different = sum(len(set(call)) for call in calls)
    if different == len(calls):
        return None
    padded = [(len(call), max(call)) for call in calls]
    own = np.array(lengths[:short])
    room = np.repeat([longest for _, longest in padded], [count for count, _ in padded])
    before = np.cumsum(room - own) - (room - own)  # padding of the sequences before
    places = torch.from_numpy(np.arange(own.sum()) + np.repeat(before, own))
    return Joined(short, len(places), tuple(padded), places)


def attend_joined(query: Tensor, key: Tensor, value: Tensor, joined: Joined, scale: float | None) -> Tensor:
    """Causal attention within each of the sequences, [t, heads × head_dim]; the arguments are [t, heads, head_dim]."""
    sizes = [count * longest for count, longest in joined.calls]
    parts = (_Spread.apply(each, joined.places, sum(sizes)).split(sizes) for each in (query, key, value))
    outputs = []
    for (count, _), *own in zip(joined.calls, *parts, strict=True):
        q, k, v = (each.unflatten(0, (count, -1)).transpose(1, 2) for each in own)
        output = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1).flatten(1))
    found: Tensor = _Collect.apply(torch.cat(outputs) if len(outputs) > 1 else outputs[0], joined.places)
    return found


class _Spread(torch.autograd.Function):
    """Rows put at their places among zeros. Its gradient is taken from there, which torch's own would add up slowly."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(total, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class _Collect(torch.autograd.Function):
    """The inverse of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.total = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.total, *gradient.shape[1:]).index_copy_(0, places, gradient), None
