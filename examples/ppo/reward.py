"""The example's task: write digits and commas in turn, as in `3,1,4,1,5`. Nothing has to be known for it."""

from __future__ import annotations

import argparse
from itertools import pairwise

from rltrain.sample import Sample

LENGTH = 24  # characters that count


async def reward(args: argparse.Namespace, sample: Sample) -> float:
    """Share of the first 24 characters that follow well: a comma after a digit, a digit after a comma."""
    text = sample.response[:LENGTH]
    good = sum(
        (first.isdigit() and second == ",") or (first == "," and second.isdigit())
        for first, second in pairwise(text)
    )
    return good / (LENGTH - 1)
