"""Fewer faults that still do it: the smallest part of a storm after which a run is not as it must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpc.chaos.faults import Fault


def shrink(
    faults: Sequence[Fault], fails: Callable[[tuple[Fault, ...]], bool], tries: int = 40
) -> tuple[Fault, ...]:
    """Leave out faults, halves first, then quarters, as long as the rest still `fails` (Zeller's ddmin, TSE 28, 2002).

    Args:
        faults: of a storm that failed.
        fails: repeats a storm with these faults; true if it fails.
        tries: storms that may be repeated.
    """
    left, parts = tuple(faults), 2
    while len(left) > 1 and tries > 0:
        size = -(-len(left) // parts)
        for start in range(0, len(left), size):
            fewer = left[:start] + left[start + size :]
            tries -= 1
            if fewer and fails(fewer):
                left, parts = fewer, max(2, parts - 1)
                break
            if tries <= 0:
                return left
        else:
            if parts >= len(left):
                return left
            parts = min(len(left), parts * 2)
    return left
