"""Puts tensors together again that several ranks of the trainer have sent parts of.

Ranks share a tensor so that no rank sends more than the others (`rltrain.megatron.model.export`). Its parts come
one soon after the other, so that few tensors at a time wait for the rest of theirs.
"""

from __future__ import annotations

import math

from torch import Tensor

from rltrain.weights.buckets import Piece


class Cuts:
    """Tensors that are not complete yet, and what has come of them. It may come in several requests of one push."""

    def __init__(self) -> None:
        self._engine = ""
        self._tensors: dict[str, tuple[Tensor, int]] = {}  # flat, and how many elements are still to come

    def begin(self, engine: str) -> None:
        """Go on, or begin anew if the trainer calls this engine by another name: the push before has failed."""
        if engine != self._engine:
            self._engine = engine
            self._tensors.clear()

    def add(self, piece: Piece, buffer: Tensor) -> Tensor | None:
        """Take a part, which lies in `buffer`; returns the tensor once all of it is there."""
        assert piece.first is not None, "it is a whole tensor"
        data, count = piece.of(buffer), math.prod(piece.shape)
        found = self._tensors.pop(piece.name, None)
        flat, left = (data.new_empty(count), count) if found is None else found
        flat[piece.first : piece.first + len(data)] = data
        if left > len(data):
            self._tensors[piece.name] = flat, left - len(data)
            return None
        return flat.view(piece.shape)
