"""Which sequences are computed together: packing into token budgets and sharing out over ranks. Pure.

Every rank computes the same plan from the same lengths, so no rank has to tell another.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from rltrain.data.prefixes import Prefixes
from rltrain.data.tree_packing import even_tree, pack_tree, tree_size

Bin = tuple[int, ...]  # indices of the sequences of one micro-batch


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: `micro_batches[data_parallel_rank][i]` are the samples of a micro-batch.

    Every rank has the same number of micro-batches, because collectives need it. One can be empty when there are
    fewer sequences than micro-batches.
    """

    micro_batches: tuple[tuple[Bin, ...], ...]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each rank."""
        return len(self.micro_batches[0])

    @property
    def num_empty(self) -> int:
        """Micro-batches without a sequence, of all ranks."""
        return sum(not micro_batch for rank in self.micro_batches for micro_batch in rank)


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
    multiple: int = 1,
    costs: Sequence[float] | None = None,
    prefixes: Prefixes | None = None,
    prefix_cost: Callable[[int], float] = float,
) -> StepPlan:
    """Share the sequences of one optimizer step out over ranks and micro-batches, balanced by cost.

    Two ways are tried. Sequences dealt to ranks and then packed give the most even ranks; sequences packed and
    the bins dealt to ranks can need fewer micro-batches, which counts for more.

    Args:
        lengths: Tokens of each sequence.
        data_parallel_size: Ranks to share them over.
        max_tokens: Token budget of a micro-batch; None takes `micro_batch_size` sequences instead.
        micro_batch_size: Sequences of a micro-batch when there is no token budget.
        multiple: Every rank's number of micro-batches is a multiple of this, as virtual pipeline stages need.
        costs: What is evened out over ranks: of each sequence, in any unit. The tokens by default.
        prefixes: What sequences have in common at their beginnings, which counts once in a micro-batch.
        prefix_cost: Of so many first tokens, in the unit of `costs`.
    """
    costs = lengths if costs is None else costs
    size = data_parallel_size
    if prefixes is not None and any(prefixes.common):
        bins = _sharing(lengths, prefixes, size, max_tokens, micro_batch_size, multiple)
        loads = [
            sum(costs[i] for i in b) - sum(prefix_cost(common) for _, common in prefixes.among(b))
            for b in bins
        ]
        return _deal(bins, loads, size)
    if max_tokens is None:
        most = max(1, math.ceil(len(lengths) / (size * micro_batch_size))) * micro_batch_size
        ranks = _spread(costs, size, most=most)
        return pack_ranks(lengths, ranks, micro_batch_size=micro_batch_size, multiple=multiple)
    dealt_first = pack_ranks(
        lengths, _spread(costs, size, most=len(lengths)), max_tokens=max_tokens, multiple=multiple
    )
    bins = pack(lengths, max_tokens)
    count = _round_up(len(bins), size * multiple)
    if count < dealt_first.num_micro_batches * size or dealt_first.num_empty > max(0, count - len(lengths)):
        bins = _even(lengths, bins, count, max_tokens)
        return _deal(bins, [sum(costs[i] for i in b) for b in bins], size)
    return dealt_first


def _deal(bins: list[list[int]], loads: Sequence[float], size: int) -> StepPlan:
    """Each of `size` ranks as many of the bins, with nearly equal loads."""
    dealt = _spread(loads, size, most=len(bins) // size)
    return StepPlan(tuple(tuple(tuple(sorted(bins[b])) for b in rank) for rank in dealt))


def _sharing(
    lengths: Sequence[int],
    prefixes: Prefixes,
    size: int,
    max_tokens: int | None,
    micro_batch_size: int,
    multiple: int,
) -> list[list[int]]:
    """Bins of sequences that share their beginnings, as many as `size` ranks can have equally many of."""
    if max_tokens is None:
        count = _round_up(math.ceil(len(lengths) / micro_batch_size), size * multiple)
        return [[int(i) for i in part] for part in np.array_split(prefixes.order, count)]
    tight = pack_tree(lengths, prefixes, max_tokens)
    return even_tree(lengths, prefixes, max_tokens, _round_up(len(tight), size * multiple), tight)


def pack_ranks(
    lengths: Sequence[int],
    ranks: Sequence[Sequence[int]],
    *,
    max_tokens: int | None = None,
    micro_batch_size: int = 1,
    multiple: int = 1,
    prefixes: Prefixes | None = None,
) -> StepPlan:
    """Micro-batches of the sequences that each rank already has, as many on every rank, longest first.

    Args:
        lengths: Tokens of each sequence.
        ranks: Indices into `lengths`.
        max_tokens: As for `plan_step`, like the rest.
    """
    own = [[lengths[i] for i in rank] for rank in ranks]
    trees = [prefixes.subset(rank) if prefixes else Prefixes.none(len(rank)) for rank in ranks]
    if any(any(tree.common) for tree in trees):
        binned = _sharing_of_ranks(own, trees, max_tokens, micro_batch_size, multiple)
    elif max_tokens is None:
        count = _round_up(max(math.ceil(len(each) / micro_batch_size) for each in own), multiple)
        binned = [_spread(each, count, most=micro_batch_size) for each in own]
    else:
        tight = [pack(each, max_tokens) for each in own]
        count = _round_up(max(map(len, tight)), multiple)
        binned = [_even(each, bins, count, max_tokens) for each, bins in zip(own, tight, strict=True)]
    # Ranks that have experts in common wait for each other in every layer: let them do their long ones together.
    return StepPlan(
        tuple(
            tuple(
                tuple(sorted(rank[j] for j in b))
                for b in sorted(bins, key=lambda b: -tree_size(each, tree, b))
            )
            for rank, each, tree, bins in zip(ranks, own, trees, binned, strict=True)
        )
    )


def _sharing_of_ranks(
    own: list[list[int]],
    trees: list[Prefixes],
    max_tokens: int | None,
    micro_batch_size: int,
    multiple: int,
) -> list[list[list[int]]]:
    """Bins of each rank's sequences, as many on every rank.

    Args:
        own: Lengths of each rank's sequences.
        trees: What they have in common.
    """
    if max_tokens is None:
        count = _round_up(max(math.ceil(len(each) / micro_batch_size) for each in own), multiple)
        return [[[int(i) for i in part] for part in np.array_split(tree.order, count)] for tree in trees]
    tight = [pack_tree(each, tree, max_tokens) for each, tree in zip(own, trees, strict=True)]
    count = _round_up(max(map(len, tight)), multiple)
    return [
        even_tree(each, tree, max_tokens, count, bins)
        for each, tree, bins in zip(own, trees, tight, strict=True)
    ]


def _even(lengths: Sequence[int], tight: list[list[int]], count: int, max_tokens: int) -> list[list[int]]:
    """`count` bins of nearly equal size where they keep to the budget, else the tight ones, split."""
    bins = _spread(lengths, count, most=max(1, len(lengths)))
    if any(len(b) > 1 and sum(lengths[i] for i in b) > max_tokens for b in bins):
        return _split(tight, lengths, count)
    return bins


def _spread(loads: Sequence[float], count: int, *, most: int) -> list[list[int]]:
    """`count` bins of nearly equal load, with at most `most` entries each: longest first to the emptiest."""
    bins: list[list[int]] = [[] for _ in range(count)]
    totals: list[tuple[float, int]] = [(0, b) for b in range(count)]  # a heap; full bins are dropped
    for i in sorted(range(len(loads)), key=lambda i: -loads[i]):
        total, b = heappop(totals)
        bins[b].append(i)
        if len(bins[b]) < most:
            heappush(totals, (total + loads[i], b))
    return bins


def _split(bins: list[list[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Split the fullest bins until there are `count`; empty ones where nothing is left to split."""
    bins = [list(b) for b in bins]
    fullest = [(-sum(lengths[i] for i in b), number) for number, b in enumerate(bins) if len(b) > 1]
    heapify(fullest)
    while len(bins) < count and fullest:
        _, number = heappop(fullest)
        whole = bins[number]
        halves = _spread([lengths[i] for i in whole], 2, most=len(whole))
        bins[number], other = ([whole[i] for i in half] for half in halves)
        bins.append(other)
        for each in (number, len(bins) - 1):
            if len(bins[each]) > 1:
                heappush(fullest, (-sum(lengths[i] for i in bins[each]), each))
    return bins + [[] for _ in range(count - len(bins))]


def _round_up(value: int, multiple: int) -> int:
    return max(1, math.ceil(value / multiple)) * multiple
