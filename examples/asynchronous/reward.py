"""A reward that a model without any training can find: write even digits."""

from __future__ import annotations

import argparse

from rltrain.sample import Sample


async def reward(args: argparse.Namespace, sample: Sample) -> float:
    """Share of the response's characters that are even digits; 0 for an empty response."""
    return sum(character in "02468" for character in sample.response) / max(1, len(sample.response))
