"""The trainable tokens of a rollout: response tokens whose loss mask is 1. Pure NumPy.

Per-token values of the trainer are kept as one array a sample over just these tokens, so that nothing behind
this module knows about masks or prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rltrain.data.batch import TrainBatch

Flat = list[NDArray[np.float32]]  # one array a sample, over its trainable tokens


@dataclass(frozen=True)
class TrainableTokens:
    """Where they are; one entry a sample.

    Attributes:
        masks: [response_length] bool.
        positions: [trainable tokens]: the position in the sequence whose logits predict the token.
    """

    masks: list[NDArray[np.bool_]]
    positions: list[NDArray[np.int64]]

    @classmethod
    def of(cls, batch: TrainBatch) -> TrainableTokens:
        """The trainable tokens of every sample of a rollout."""
        masks = [mask.astype(bool) for mask in batch.loss_masks]
        # The logits at position t predict token t + 1.
        positions = [
            np.flatnonzero(mask) + len(tokens) - len(mask) - 1
            for tokens, mask in zip(batch.tokens, masks, strict=True)
        ]
        return cls(masks, positions)

    def count(self, sample: int) -> int:
        """Trainable tokens of a sample."""
        return len(self.positions[sample])

    def spread(self, values: Sequence[float] | NDArray[Any]) -> Flat:
        """A sample's value on each of its tokens."""
        return [
            np.full(len(positions), value, dtype=np.float32)
            for positions, value in zip(self.positions, values, strict=True)
        ]

    def select(self, values: Sequence[NDArray[np.float32]]) -> Flat:
        """The trainable ones of values that were given for every response token."""
        return [value[mask] for value, mask in zip(values, self.masks, strict=True)]
