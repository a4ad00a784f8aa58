"""One packed micro-batch as tensors: what goes into the model, and what its loss needs for each token.

The loss is flat over trainable tokens: the model computes logits at `rows` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rltrain.data.batch import TrainBatch
from rltrain.data.trainable import Flat, TrainableTokens
from rltrain.megatron.attention import PackedSequences
from rltrain.megatron.responses import Responses


@dataclass(frozen=True)
class MicroBatch:
    """Tensors on this rank's device. t tokens in all, n of them trainable."""

    indices: tuple[int, ...]  # samples, in the order in which they are packed
    tokens: Tensor  # [1, t] int64
    sequences: PackedSequences
    rows: Tensor  # [n] int64: positions in `tokens` whose logits predict `targets`
    targets: Tensor  # [n] int64
    values: dict[str, Tensor]  # [n] float32 each: per-token inputs of the loss, by name
    responses: Responses


def computed_length(tokens: NDArray[np.int32]) -> int:
    """Tokens of a sequence that go through the model: all but the last, whose logits nobody needs."""
    return len(tokens) - 1


def build_micro_batch(
    batch: TrainBatch,
    trainable: TrainableTokens,
    indices: Sequence[int],
    values: dict[str, Flat],
    *,
    align: int,
    device: torch.device,
) -> MicroBatch:
    """Pack samples one after the other, sorted by length: attention joins sequences of equal length.

    Args:
        indices: Samples of the micro-batch; none gives a micro-batch of padding without trainable tokens.
        values: Per-token values of the whole rollout, by name.
        align: The number of tokens is padded to a multiple of this, as sequence parallelism needs.
    """
    order = tuple(sorted(indices, key=lambda i: (len(batch.tokens[i]), i)))
    lengths = [computed_length(batch.tokens[i]) for i in order]
    starts = np.cumsum([0, *lengths])
    padding = -int(starts[-1]) % align if order else align
    tokens = [batch.tokens[i][:-1] for i in order] + [np.zeros(padding, dtype=np.int32)]
    rows = [trainable.positions[i] + start for i, start in zip(order, starts[:-1], strict=True)]
    targets = [batch.tokens[i][trainable.positions[i] + 1] for i in order]

    def tensor(parts: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> Tensor:
        joined = np.concatenate([np.empty(0, dtype), *parts], dtype=dtype)
        return torch.from_numpy(joined).to(device, non_blocking=True)

    return MicroBatch(
        indices=order,
        tokens=tensor(tokens, np.int64).unsqueeze(0),
        sequences=PackedSequences.from_lengths(lengths + [padding] * (padding > 0), device),
        rows=tensor(rows, np.int64),
        targets=tensor(targets, np.int64),
        values={name: tensor([flat[i] for i in order], np.float32) for name, flat in values.items()},
        responses=Responses.of(batch, order, device),
    )
