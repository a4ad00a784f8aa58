"""Which sequences are computed together: packing into token budgets and sharing out over ranks. Pure.

Every rank computes the same plan from the same lengths, so no rank has to tell another.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

Bin = tuple[int, ...]  # indices of the sequences of one micro-batch


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: `micro_batches[data_parallel_rank][i]` are the samples of a micro-batch.

    Every rank has the same number of micro-batches, as collectives need. One can be empty when there are
    fewer sequences than micro-batches.
    """

    micro_batches: tuple[tuple[Bin, ...], ...]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each rank."""
        return len(self.micro_batches[0])


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit, longest first: each sequence goes to the fullest bin that still has room.

    Bins are kept sorted by the room that is left, so finding the best one is a binary search.

    Args:
        lengths: Tokens of each sequence.
        capacity: Most tokens of a bin. A sequence longer than that gets a bin of its own.

    Returns:
        Bins of indices into `lengths`.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        at = bisect_left(rooms, (length, -1))
        if at == len(rooms):
            bins.append([i])
            if length < capacity:
                insort(rooms, (capacity - length, len(bins) - 1))
            continue
        room, b = rooms.pop(at)
        bins[b].append(i)
        if room > length:
            insort(rooms, (room - length, b))
    return bins


def plan_step(
    lengths: Sequence[int],
    data_parallel_size: int,
    *,
    max_tokens: int | None = None,
    micro_batch_size: int = 1,
) -> StepPlan:
    """Share the sequences of one optimizer step out over ranks and micro-batches, balanced by tokens.

    Args:
        lengths: Tokens of each sequence.
        data_parallel_size: Ranks to share them over.
        max_tokens: Token budget of a micro-batch; None takes `micro_batch_size` sequences instead.
        micro_batch_size: Sequences of a micro-batch when there is no token budget.
    """
    if max_tokens is None:
        count = _round_up(math.ceil(len(lengths) / micro_batch_size), data_parallel_size)
        bins = _spread(lengths, count, most=micro_batch_size)
    else:
        packed = pack(lengths, max_tokens)
        count = _round_up(len(packed), data_parallel_size)
        bins = _spread(lengths, count, most=len(lengths))
        if any(len(b) > 1 and sum(lengths[i] for i in b) > max_tokens for b in bins):
            bins = _split(packed, lengths, count)  # even bins would overflow: keep the tight ones
    loads = [sum(lengths[i] for i in b) for b in bins]
    ranks = _spread(loads, data_parallel_size, most=count // data_parallel_size)
    return StepPlan(tuple(tuple(tuple(sorted(bins[b])) for b in rank) for rank in ranks))


def _spread(loads: Sequence[int], count: int, *, most: int) -> list[list[int]]:
    """`count` bins of nearly equal load, with at most `most` entries each: longest first to the emptiest."""
    bins: list[list[int]] = [[] for _ in range(count)]
    totals = [(0, b) for b in range(count)]  # ascending; full bins are dropped
    for i in sorted(range(len(loads)), key=lambda i: -loads[i]):
        total, b = totals.pop(0)
        bins[b].append(i)
        if len(bins[b]) < most:
            insort(totals, (total + loads[i], b))
    return bins


def _split(bins: list[list[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Split the fullest bins until there are `count`; empty ones where nothing is left to split."""
    bins = [list(b) for b in bins]
    while len(bins) < count:
        splittable = [b for b in bins if len(b) > 1]
        if not splittable:
            return bins + [[] for _ in range(count - len(bins))]
        fullest = max(splittable, key=lambda b: sum(lengths[i] for i in b))
        halves = _spread([lengths[i] for i in fullest], 2, most=len(fullest))
        bins.append([fullest[i] for i in halves[1]])
        fullest[:] = [fullest[i] for i in halves[0]]
    return bins


def _round_up(value: int, multiple: int) -> int:
    return max(1, math.ceil(value / multiple)) * multiple
