"""In which order the prompts of one file or several come: an epoch is a pure function of seed and number."""

from __future__ import annotations

import argparse
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Epochs:
    """Positions in the joined prompts of several files.

    A file of weight 2 has each prompt twice in an epoch; of weight 0.5, half of its prompts, the other half
    in the next epoch: over epochs all prompts of a file come equally often.
    """

    sizes: tuple[int, ...]  # prompts of each file
    weights: tuple[float, ...]
    seed: int = 0
    shuffle: bool = False

    def __len__(self) -> int:
        """Prompts of an epoch."""
        return sum(self._share(i) for i in range(len(self.sizes)))

    def order(self, epoch: int) -> Sequence[int]:
        """The positions of an epoch: the same for the same seed, on every machine."""
        return _order(self, epoch)

    def _share(self, file: int) -> int:
        return max(1, round(self.sizes[file] * self.weights[file]))


@lru_cache(maxsize=1)
def _order(epochs: Epochs, epoch: int) -> Sequence[int]:
    positions = array("q")  # 8 bytes a prompt
    first = 0
    for file, size in enumerate(epochs.sizes):
        share = epochs._share(file)
        own: Sequence[int] = range(size)
        if share % size:  # which ones come is drawn; where that goes on is the next epoch's start
            own = array("q", own)
            random.Random(f"{epochs.seed}/file {file}").shuffle(own)
        positions.extend(first + own[(epoch * share + i) % size] for i in range(share))
        first += size
    if epochs.shuffle:
        random.Random(f"{epochs.seed}/{epoch}").shuffle(positions)
    return positions


def prompt_files(args: argparse.Namespace) -> list[tuple[str, float]]:
    """The prompt files that the flags name, each with its weight."""
    if args.prompt_data_mix:
        mix = args.prompt_data_mix
        return [(path, float(weight)) for path, weight in zip(mix[::2], mix[1::2], strict=True)]
    return [(args.prompt_data, 1.0)]
