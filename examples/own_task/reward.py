"""A reward function of your own: is the capital named, and nothing but it?"""

from __future__ import annotations

import argparse

from rltrain.sample import Sample


async def reward(args: argparse.Namespace, sample: Sample) -> float:
    """1 for the label alone, less the more words stand around it, 0 without it."""
    words = sample.response.strip().rstrip(".").split()
    if sample.label not in words:
        return 0.0
    return 1.0 / len(words)
