"""One packed micro-batch as tensors: what goes into the model, and what its loss needs for each token.

The loss is flat over trainable tokens: the model computes logits at `rows` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rltrain.data.batch import TrainBatch
from rltrain.data.trainable import Flat, TrainableTokens
from rltrain.megatron.attention import PackedSequences
from rltrain.megatron.context_parallel import chunk_multiple, own_positions
from rltrain.megatron.responses import Responses

_PADDING_LENGTH = 128


@dataclass(frozen=True)
class MicroBatch:
    """Tensors on this rank's device. t tokens in all, n of them trainable.

    Context parallel ranks share both out: a rank has t / ranks tokens and `rows` and `targets` for those of the n
    that are among its tokens. Values are over all n on every rank.
    """

    indices: tuple[int, ...]  # samples, in the order in which they are packed
    tokens: Tensor  # [1, own t] int64
    padding: Tensor  # [1, own t] bool: tokens of no sample
    sequences: PackedSequences
    rows: Tensor  # [own n] int64: positions in `tokens` whose logits predict `targets`
    targets: Tensor  # [own n] int64
    own: Tensor  # [own n] int64: which of the n they are
    num_trainable: int  # n
    values: dict[str, Tensor]  # [n] float32 each: per-token inputs of the loss, by name
    responses: Responses
    last_tokens: Tensor  # [samples] int64: the last token of each, which is only a target

    def with_all_rows(self) -> MicroBatch:
        """The same, with logits of every token."""
        return replace(self, rows=torch.arange(self.tokens.shape[1], device=self.tokens.device))


@dataclass(frozen=True)
class TokenSplit:
    """How the tokens of a micro-batch are shared out over ranks.

    Attributes:
        sequence_size: Ranks that share this rank's tokens by sequence parallelism.
        min_tokens: Micro-batches are padded to at least this many tokens (of all ranks).
    """

    sequence_size: int = 1
    context_size: int = 1
    context_rank: int = 0
    min_tokens: int = 0

    def padded(self, length: int) -> int:
        """Tokens that a sequence takes up."""
        return _round_up(length, chunk_multiple(self.context_size))

    def padded_total(self, tokens: int) -> int:
        """Tokens that a micro-batch takes up."""
        multiple = self.sequence_size * chunk_multiple(self.context_size)
        return _round_up(max(tokens, self.min_tokens, 1), multiple)


def computed_length(tokens: NDArray[np.int32]) -> int:
    """Tokens of a sequence that go through the model: all but the last, whose logits nobody needs."""
    return len(tokens) - 1


def build_micro_batch(
    batch: TrainBatch,
    trainable: TrainableTokens,
    indices: Sequence[int],
    values: dict[str, Flat],
    *,
    split: TokenSplit,
    device: torch.device,
) -> MicroBatch:
    """Pack samples one after the other, sorted by length: attention joins sequences of equal length.

    Args:
        indices: Samples of the micro-batch; none gives a micro-batch of padding without trainable tokens.
        values: Per-token values of the whole rollout, by name.
    """
    order = tuple(sorted(indices, key=lambda i: (len(batch.tokens[i]), i)))
    lengths = [split.padded(computed_length(batch.tokens[i])) for i in order]
    starts = [int(start) for start in np.cumsum([0, *lengths])]
    total = split.padded_total(starts[-1])
    lengths += _padding(total - starts[-1], chunk_multiple(split.context_size))
    tokens = np.zeros(total, np.int64)
    padding = np.ones(total, bool)
    for i, start in zip(order, starts[:-1], strict=True):
        place_of = slice(start, start + computed_length(batch.tokens[i]))
        tokens[place_of], padding[place_of] = batch.tokens[i][:-1], False
    rows = _join([trainable.positions[i] + start for i, start in zip(order, starts[:-1], strict=True)])
    targets = _join([batch.tokens[i][trainable.positions[i] + 1] for i in order])
    own_tokens = own_positions(lengths, split.context_size, split.context_rank)
    place = np.full(total, -1)
    place[own_tokens] = np.arange(len(own_tokens))
    own = np.flatnonzero(place[rows] >= 0)

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return MicroBatch(
        indices=order,
        tokens=tensor(tokens[own_tokens]).unsqueeze(0),
        padding=tensor(padding[own_tokens]).unsqueeze(0),
        sequences=PackedSequences.from_lengths(lengths, device, split.context_size),
        rows=tensor(place[rows][own]),
        targets=tensor(targets[own]),
        own=tensor(own),
        num_trainable=len(rows),
        values={name: tensor(_join([flat[i] for i in order], np.float32)) for name, flat in values.items()},
        responses=Responses.of(batch, order, device),
        last_tokens=tensor(_join([batch.tokens[i][-1:] for i in order])),
    )


def _join(parts: Sequence[NDArray[Any]], dtype: type[np.generic] = np.int64) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype)


def _padding(tokens: int, multiple: int) -> list[int]:
    """Lengths of sequences of padding: short ones, because attention to them costs too."""
    piece = _round_up(_PADDING_LENGTH, multiple)
    return [piece] * (tokens // piece) + ([tokens % piece] if tokens % piece else [])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
