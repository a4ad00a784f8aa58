"""Sequences that are shared out over context parallel ranks.

Each sequence is cut into 2·size chunks, and a rank takes one from the front and its mirror image from the back
(chunks r and 2·size − 1 − r), so that causal attention costs all ranks the same. This is also how
TransformerEngine's attention expects packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor


def chunk_multiple(size: int) -> int:
    """What the length of every packed sequence must be a multiple of."""
    return 2 * size if size > 1 else 1


def own_positions(lengths: Sequence[int], size: int, rank: int) -> NDArray[np.int64]:
    """Where a rank's tokens are among all tokens of packed sequences, in the order in which it holds them.

    Args:
        lengths: Tokens of each sequence, multiples of `chunk_multiple(size)`.
    """
    if size == 1:
        return np.arange(sum(lengths), dtype=np.int64)
    parts = []
    start = 0
    for length in lengths:
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            parts.append(np.arange(start + number * chunk, start + (number + 1) * chunk, dtype=np.int64))
        start += length
    return np.concatenate(parts)


def whole_order(lengths: Sequence[int], size: int) -> NDArray[np.int64]:
    """Indices that bring all ranks' tokens, one rank's after the other's, into the sequences' own order."""
    return np.argsort(np.concatenate([own_positions(lengths, size, rank) for rank in range(size)]))


def attended_keys(
    lengths: Sequence[int], size: int, rank: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Causal attention of a rank's queries as that of twice as many sequences, each to the keys up to its end.

    Returns:
        Which of the sequences' keys these are, one chunk's after the other's; and where the queries, and the keys, of
        each chunk begin, and the last ones end.
    """
    queries, keys, parts = [0], [0], []
    start = 0
    for length in lengths:
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            end = (number + 1) * chunk
            parts.append(np.arange(start, start + end, dtype=np.int64))
            queries.append(queries[-1] + chunk)
            keys.append(keys[-1] + end)
        start += length
    return np.concatenate(parts), np.array(queries, np.int32), np.array(keys, np.int32)


def positions_in_sequence(offsets: Tensor, count: int, size: int, rank: int) -> Tensor:
    """The place of each of a rank's tokens in its sequence.

    Args:
        offsets: Where each whole sequence begins and the last one ends, [sequences + 1]. They are not read back, for
            which a GPU would have to be waited for.
        count: Tokens of the rank.
    """
    starts = offsets.long() // size
    index = torch.arange(count, device=offsets.device)
    sequence = torch.searchsorted(starts[1:], index, right=True)
    place = index - starts[sequence]
    if size == 1:
        return place
    chunk = (starts.diff() // 2)[sequence]
    back = (2 * size - 2 - rank) * chunk
    return place + torch.where(place < chunk, rank * chunk, back)


class _GatherTokens(torch.autograd.Function):
    """All ranks' tokens one after the other; gradients are summed over the ranks that used a token."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        result = own.new_empty((group.size() * own.shape[0], *own.shape[1:]))
        dist.all_gather_into_tensor(result, own.contiguous(), group=group)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        result = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(result, grad.contiguous(), group=ctx.group)
        return result, None


def gather_tokens(own: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole sequences from every rank's tokens, [own tokens, …] to [all tokens, …].

    Args:
        order: `whole_order` of the packed sequences.
    """
    return _GatherTokens.apply(own, group).index_select(0, order)


class _GatherOutputs(torch.autograd.Function):
    """The whole sequences from every rank's tokens. Each rank's gradient goes to its own tokens alone."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(order.argsort().chunk(group.size())[group.rank()])
        result = own.new_empty((group.size() * own.shape[0], *own.shape[1:]))
        dist.all_gather_into_tensor(result, own.contiguous(), group=group)
        return result.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None


def gather_outputs(own: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """As `gather_tokens`, where every rank computes the same loss from the result."""
    return _GatherOutputs.apply(own, order, group)


class _GatherValues(torch.autograd.Function):
    """Rows of values from all ranks in one message. Each rank's gradient goes to its own values alone."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, count: int, group: dist.ProcessGroup, *own: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index)
        whole = own[0].new_zeros((len(own), count))
        whole[:, index] = torch.stack(own)
        dist.all_reduce(whole, group=group)
        return tuple(whole.unbind())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        (index,) = ctx.saved_tensors
        return (None, None, None, *(None if grad is None else grad[index] for grad in grads))


def gather_values(
    own: Sequence[Tensor], index: Tensor, count: int, group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Per-token values of all ranks, [n] each, where every rank computes the same loss from them.

    Args:
        own: Values of this rank's tokens, [own n] each.
        index: Where they belong among the n, [own n].
        count: n.
    """
    return tuple(_GatherValues.apply(index, count, group, *own))
