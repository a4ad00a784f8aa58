"""Packing samples that share their beginnings into token budgets: what a micro-batch shares, it computes once. Pure.

A group of samples is cut where that fills a micro-batch, for which its prompt is computed once more. So groups with
short prompts are cut first, and of a group those samples are taken that fill the room best.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import count as count_from
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rltrain.data.prefixes import Prefixes

_SUBSETS = 10  # of so many samples all choices are looked at; of more, the longest first
_TRIED = 3  # groups that may be cut for one micro-batch
_WASTE = 1 / 250  # of a micro-batch may stay empty
_UNEVEN = 1 / 30  # of a micro-batch: so much smaller ones are not looked for
_LOOSER = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.8, 2.5)  # than even micro-batches: tried one after the other


class Branch(NamedTuple):
    """Samples that are not cut: tokens beside those that they share with the rest of their group."""

    size: int
    samples: list[int]


class Group(NamedTuple):
    """Samples with a common beginning.

    Attributes:
        root: Tokens of it.
        branches: Longest first.
        size: Tokens that are computed.
    """

    root: int
    branches: list[Branch]
    size: int

    @classmethod
    def of(cls, root: int, branches: list[Branch]) -> Group:
        """The group of these."""
        return cls(root, branches, root + sum([branch.size for branch in branches]))

    @property
    def samples(self) -> list[int]:
        """All of them."""
        return [sample for branch in self.branches for sample in branch.samples]


def pack_tree(lengths: Sequence[int], prefixes: Prefixes, capacity: int) -> list[list[int]]:
    """Micro-batches of up to `capacity` computed tokens; a longer sample has one for itself.

    Args:
        lengths: Tokens of each sample.
        prefixes: Of the samples.
    """
    if not lengths:
        return []
    return _Tree(lengths, prefixes, capacity).bins(0, len(lengths), 0)


def even_tree(
    lengths: Sequence[int], prefixes: Prefixes, capacity: int, count: int, tight: list[list[int]]
) -> list[list[int]]:
    """`count` micro-batches of nearly equal size; empty ones where there are fewer samples.

    Args:
        tight: What `pack_tree` returned, `count` or fewer.
    """
    least = -(-sum(tree_size(lengths, prefixes, each) for each in tight) // count)
    bins = [*tight]
    for size in (int(least * factor) for factor in _LOOSER):
        if size > capacity * (1 - _UNEVEN):
            break
        if len(found := pack_tree(lengths, prefixes, size)) <= count:
            bins = found
            break
    return _cut_longest(lengths, prefixes, bins, count)


def _cut_longest(
    lengths: Sequence[int], prefixes: Prefixes, bins: list[list[int]], count: int
) -> list[list[int]]:
    """The longest cut in two until there are `count`; empty ones where nothing is left to cut."""
    numbered = dict(enumerate(bins))
    numbers = count_from(len(bins))

    def key(number: int) -> tuple[int, int]:
        return -tree_size(lengths, prefixes, numbered[number]), number

    longest = [key(number) for number, each in numbered.items() if len(each) > 1]
    heapify(longest)
    while len(numbered) < count and longest:
        for half in _halves(lengths, prefixes, numbered.pop(heappop(longest)[1])):
            number = next(numbers)
            numbered[number] = half
            if len(half) > 1:
                heappush(longest, key(number))
    return [*numbered.values(), *([] for _ in range(count - len(numbered)))]


def _halves(lengths: Sequence[int], prefixes: Prefixes, samples: list[int]) -> tuple[list[int], list[int]]:
    """Samples cut in two where that leaves the two most even, at what it costs to compute the beginning twice."""
    found = prefixes.among(samples)
    before = np.cumsum([lengths[i] - common for i, common in found]).tolist()
    sizes = [
        (max(before[at - 1], before[-1] - before[at - 1] + found[at][1]), at) for at in range(1, len(found))
    ]
    _, at = min(sizes)
    order = [i for i, _ in found]
    return order[:at], order[at:]


def tree_size(lengths: Sequence[int], prefixes: Prefixes, samples: Sequence[int]) -> int:
    """Tokens of these samples that are computed where they are together."""
    return sum(lengths[i] for i in samples) - prefixes.shared(samples)


class _Tree:
    """The samples from one place in the dictionary's order to another share `depth` tokens, and are one node."""

    def __init__(self, lengths: Sequence[int], prefixes: Prefixes, capacity: int) -> None:
        self._lengths, self._prefixes, self._capacity = lengths, prefixes, capacity
        self._order, self._common = prefixes.order, prefixes.common
        own = (lengths[i] - common for i, common in zip(prefixes.order, prefixes.common, strict=True))
        self._before = np.cumsum([0, *own]).tolist()

    def bins(self, first: int, last: int, depth: int) -> list[list[int]]:
        """Micro-batches of a node, with room for what is below `depth`."""
        room = self._capacity - depth
        groups: list[Group] = []
        for start, end in self._children(first, last, depth):
            groups += self._groups(start, end, depth, room)
        return _fill(groups, room)

    def _children(self, first: int, last: int, depth: int) -> list[tuple[int, int]]:
        cuts = [first, *(at for at in range(first + 1, last) if self._common[at] <= depth), last]
        return list(pairwise(cuts))

    def _size(self, first: int, last: int, depth: int) -> int:
        return int(self._before[last] - self._before[first]) + self._common[first] - depth

    def _groups(self, first: int, last: int, depth: int, room: int) -> list[Group]:
        """A child of a node as one group, or as several if it must be cut below its own children."""
        if last - first == 1:
            return [self._alone(first, depth)]
        root = min(self._common[first + 1 : last])
        is_large = self._size(first, last, depth) > room
        if is_large and room <= root - depth:  # there is not even room for what they share
            return [self._alone(at, depth) for at in range(first, last)]
        children = self._children(first, last, root)
        if is_large and len(children) < last - first:
            parts = self.bins(first, last, root)
            sizes = [self._size_of(part, root) for part in parts]
            return [Group.of(root - depth, [Branch(*each)]) for each in zip(sizes, parts, strict=True)]
        branches = [Branch(self._size(*child, root), list(self._order[slice(*child)])) for child in children]
        return [Group.of(root - depth, sorted(branches, reverse=True))]

    def _alone(self, at: int, depth: int) -> Group:
        sample = self._order[at]
        return Group.of(0, [Branch(self._lengths[sample] - depth, [sample])])

    def _size_of(self, samples: Sequence[int], depth: int) -> int:
        return tree_size(self._lengths, self._prefixes, samples) - depth


def _fill(groups: list[Group], room: int) -> list[list[int]]:
    """The largest group first; what room it leaves is filled with the group that fits, or with a part of one."""
    pool = _Pool(groups)
    bins = []
    while pool:
        group = pool.take_largest()
        if group.size > room and len(group.branches) > 1:
            group, rest = _cut(group, room)
            pool.add(rest)
        taken, left = group.samples, room - group.size
        while left > room * _WASTE and (found := pool.take(left, room * _WASTE)) is not None:
            taken, left = taken + found.samples, left - found.size
        bins.append(taken)
    return bins


class _Pool:
    """Groups that are in no micro-batch yet."""

    def __init__(self, groups: list[Group]) -> None:
        self._groups: list[Group] = []
        self._by_size: list[tuple[int, int]] = []  # and number
        self._by_root: list[tuple[int, int]] = []  # of those that can be cut
        for group in groups:
            self._groups.append(group)
            self._by_size.append((group.size, len(self._groups) - 1))
            if len(group.branches) > 1:
                self._by_root.append((group.root, len(self._groups) - 1))
        self._by_size.sort()
        self._by_root.sort()

    def __bool__(self) -> bool:
        return bool(self._by_size)

    def add(self, group: Group) -> None:
        number = len(self._groups)
        self._groups.append(group)
        insort(self._by_size, (group.size, number))
        if len(group.branches) > 1:
            insort(self._by_root, (group.root, number))

    def take_largest(self) -> Group:
        return self._removed(self._by_size[-1])

    def take(self, room: int, waste: float) -> Group | None:
        """A group, or a part of one, that fills `room` but for `waste`; else what fills it best; None: nothing fits."""
        at = bisect_right(self._by_size, room, key=lambda each: each[0]) - 1
        fits = self._by_size[at] if at >= 0 else None
        if fits is not None and room - fits[0] <= waste:
            return self._removed(fits)
        best: tuple[int, Group, Group, tuple[int, int]] | None = None
        for _, number in self._by_root[:_TRIED]:
            group = self._groups[number]
            if group.size <= room or group.root + group.branches[-1].size > room:
                continue
            part, rest = _cut(group, room)
            if best is None or part.size - part.root > best[0]:
                best = (part.size - part.root, part, rest, (group.size, number))
            if room - part.size <= waste:
                break
        if best is not None and (fits is None or best[0] > fits[0]):
            self._removed(best[3])
            self.add(best[2])
            return best[1]
        return None if fits is None else self._removed(fits)

    def _removed(self, key: tuple[int, int]) -> Group:
        group = self._groups[key[1]]
        del self._by_size[bisect_right(self._by_size, key) - 1]
        if len(group.branches) > 1:
            del self._by_root[bisect_right(self._by_root, (group.root, key[1])) - 1]
        return group


def _cut(group: Group, room: int) -> tuple[Group, Group]:
    """The part of a group that fills `room` best, of one branch at least, and the rest."""
    sizes = [branch.size for branch in group.branches]
    chosen = _best_subset(sizes, room - group.root) or {len(sizes) - 1}
    part = [branch for i, branch in enumerate(group.branches) if i in chosen]
    rest = [branch for i, branch in enumerate(group.branches) if i not in chosen]
    return Group.of(group.root, part), Group.of(group.root, rest)


def _best_subset(sizes: list[int], room: int) -> set[int]:
    """Some but not all of the sizes, longest first, whose sum comes nearest to `room` from below."""
    chosen: set[int] = set()
    for i in range(len(sizes) - _SUBSETS):  # the many: as long as they fit, the longest
        if sizes[i] <= room:
            chosen.add(i)
            room -= sizes[i]
    last = sizes[-_SUBSETS:]
    sums = _choices(len(last)) @ np.array(last)
    sums[sums > room] = -1
    if len(chosen) == len(sizes) - len(last):
        sums[-1] = -1  # not all
    best = int(sums.argmax())
    first = len(sizes) - len(last)
    return chosen | {first + i for i in range(len(last)) if best >> i & 1}


@cache
def _choices(count: int) -> NDArray[np.int64]:
    """[2 ** count, count] of 0 and 1."""
    return np.arange(2**count)[:, None] >> np.arange(count) & 1
