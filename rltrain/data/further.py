"""Inputs of the layer that predicts the token after the next (MTP), from packed samples. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Further:
    """m tokens, each sample's one after the other, and which later ones they predict.

    Samples that share their beginnings are apart here: the token after what they share is another one for each.

    Attributes:
        lengths: Tokens of each sample: all but its last two.
        places: [m] where the tokens are among those of the micro-batch.
        tokens: [m] the token after each.
        rows: [k] which of the m predict a token that is trained on.
        targets: [k] that token, the second after it.
        weights: [k] of the target in the loss, float32.
    """

    lengths: list[int]
    places: NDArray[np.int64]
    tokens: NDArray[np.int64]
    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]


def further_tokens(
    tokens: Sequence[NDArray[np.int32]],
    places: Sequence[NDArray[np.int64]],
    positions: Sequence[NDArray[np.int64]],
    weights: Sequence[NDArray[np.float32]],
) -> Further:
    """Lay the samples of a micro-batch out, the shortest first: attention joins sequences of equal length.

    A token that is trained on is predicted here too, unless it is its sample's first or second.

    Args:
        tokens: Of each sample, all of them.
        places: Where each one's tokens but the last are in the micro-batch.
        positions: Of each, the tokens before those that are trained on.
        weights: Of each, those of the tokens that are trained on.
    """
    lengths: list[int] = []
    parts: list[tuple[NDArray[np.generic], ...]] = []
    start = 0
    for i in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
        length = len(tokens[i]) - 2
        if length < 1:
            continue
        predicted = positions[i] >= 1
        at = positions[i][predicted]
        parts.append(
            (places[i][:length], tokens[i][1:-1], start + at - 1, tokens[i][at + 1], weights[i][predicted])
        )
        lengths.append(length)
        start += length
    columns = [[part[column] for part in parts] for column in range(5)]
    places_, tokens_, rows, targets = (
        np.concatenate([np.empty(0, np.int64), *each], dtype=np.int64) for each in columns[:4]
    )
    of_loss = np.concatenate([np.empty(0, np.float32), *columns[4]], dtype=np.float32)
    return Further(lengths, places_, tokens_, rows, targets, of_loss)
