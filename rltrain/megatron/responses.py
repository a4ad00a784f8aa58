"""Values over whole responses, as slime's custom functions take them, and over trainable tokens, as ours do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rltrain.data.batch import TrainBatch


@dataclass(frozen=True)
class Responses:
    """The responses of one micro-batch, in the order in which its tokens are packed."""

    total_lengths: list[int]
    response_lengths: list[int]
    loss_masks: list[Tensor]  # [response length] float32 of 0 and 1

    @classmethod
    def of(cls, batch: TrainBatch, indices: Sequence[int], device: torch.device) -> Responses:
        """Those of some samples of a rollout.

        Without samples it is one response of one token that is not trained on, so that no custom function
        has to expect an empty list.
        """
        if not indices:
            return cls([1], [1], [torch.zeros(1, device=device)])
        return cls(
            total_lengths=[len(batch.tokens[i]) for i in indices],
            response_lengths=[batch.response_lengths[i] for i in indices],
            loss_masks=[torch.from_numpy(batch.loss_masks[i].astype(np.float32)).to(device) for i in indices],
        )

    def counts(self, device: torch.device) -> Tensor:
        """Trainable tokens of each response, [responses] int64."""
        return torch.tensor([int(mask.sum()) for mask in self.loss_masks], dtype=torch.int64, device=device)

    def expand(self, flat: Tensor) -> Tensor:
        """Values of the n trainable tokens as values of all response tokens: 0 for the others. Keeps gradients."""
        full = flat.new_zeros(sum(self.response_lengths))
        return full.index_put((self._positions(flat.device),), flat)

    def collapse(self, full: Tensor) -> Tensor:
        """The inverse of `expand`."""
        return full.index_select(0, self._positions(full.device))

    def split(self, full: Tensor) -> list[Tensor]:
        """Values of all response tokens, one tensor a response."""
        return list(full.split(self.response_lengths))

    def _positions(self, device: torch.device) -> Tensor:
        return torch.cat(self.loss_masks).nonzero().squeeze(1).to(device)
