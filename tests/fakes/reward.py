"""A reward that differs from sample to sample, so that weights change and every step depends on the last."""

from typing import Any


async def by_content(args: Any, sample: Any) -> float:
    """Between 0 and 1, from the response's characters."""
    return sum(map(ord, sample.response)) % 17 / 16
