"""What samples have in common at their beginnings, and how they are laid out so that it is computed once. Pure.

Samples of a group have the same prompt, conversations the same first turns. In the order of a dictionary, what any two
samples have in common is the least that neighbours between them have in common, so one number a sample is the whole
tree of prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# A shorter beginning is computed once a sample: joining it costs more than it saves.
LEAST = 8
_FEW = 32  # places: their least number is found as fast by looking at all


@dataclass(frozen=True)
class Prefixes:
    """A tree of prefixes.

    Attributes:
        order: The samples as a dictionary would have them.
        common: By place in that order: first tokens in common with the sample before; 0 for the first sample.
        place: By sample: its place in that order.
    """

    order: tuple[int, ...]
    common: tuple[int, ...]
    place: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[NDArray[np.int32]], least: int | None = None) -> Prefixes:
        """Those of sequences of tokens.

        Args:
            least: Fewer tokens in common count as none; by default `LEAST`.
        """
        least = LEAST if least is None else least
        keys = [
            sequence.astype(">u4").tobytes() for sequence in sequences
        ]  # bytes compare as their numbers do
        order = sorted(range(len(keys)), key=keys.__getitem__)
        common = [0] * len(order)
        beginnings = [key[: 4 * least] for key in keys]  # most pairs differ here already
        for at, (before, sample) in enumerate(pairwise(order), start=1):
            if beginnings[before] == beginnings[sample]:
                length = _in_common(sequences[before], sequences[sample])
                common[at] = length if length >= least else 0
        return cls._in_order(order, common)

    @classmethod
    def none(cls, count: int) -> Prefixes:
        """Of samples that share nothing."""
        return cls._in_order(range(count), [0] * count)

    @classmethod
    def _in_order(cls, order: Sequence[int], common: Sequence[int]) -> Prefixes:
        place = [0] * len(order)
        for at, sample in enumerate(order):
            place[sample] = at
        return cls(tuple(order), tuple(common), tuple(place))

    def among(self, samples: Sequence[int]) -> list[tuple[int, int]]:
        """These samples as a dictionary has them, each with the tokens in common with the one before of these."""
        places = sorted([self.place[i] for i in samples])
        if not self._are_some:
            return [(self.order[at], 0) for at in places]
        result = []
        for before, at in zip([-1, *places], places, strict=False):
            common = 0 if before < 0 else self._least_between(before + 1, at + 1)
            result.append((self.order[at], common))
        return result

    @cached_property
    def _are_some(self) -> bool:
        """Whether any samples have anything in common."""
        return any(self.common)

    def _least_between(self, first: int, last: int) -> int:
        """The least of `common` from one place up to another."""
        if last - first <= _FEW:
            return min(self.common[first:last])
        level = (last - first).bit_length() - 1
        least = self._least[level]
        return int(min(least[first], least[last - 2**level]))

    @cached_property
    def _least(self) -> list[NDArray[np.int64]]:
        """By level k and place: the least of `common` there and at the 2**k - 1 places after it.

        Samples of a micro-batch can lie anywhere, and looking at all that is between them would take a time that grows
        with the square of their number.
        """
        levels = [np.array(self.common, np.int64)]
        while len(levels[-1]) > (half := 2 ** (len(levels) - 1)):
            levels.append(np.minimum(levels[-1][:-half], levels[-1][half:]))
        return levels

    def subset(self, samples: Sequence[int]) -> Prefixes:
        """The tree of these samples alone, which it names by their place in `samples`."""
        number = {sample: i for i, sample in enumerate(samples)}
        found = self.among(samples)
        return self._in_order([number[sample] for sample, _ in found], [common for _, common in found])

    def shared(self, samples: Sequence[int]) -> int:
        """Tokens that need not be computed where these samples are computed together."""
        return sum(common for _, common in self.among(samples)) if self._are_some else 0


def _in_common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


@dataclass(frozen=True)
class Layout:
    """Where the tokens of samples are that are computed together.

    A segment is what a sample adds to the one before it in the dictionary's order: its own tokens, one after the other.
    Segments that share tokens lie next to each other and are a family.

    Attributes:
        order: The samples.
        places: [tokens] of each sample in `order`: where its tokens are.
        lengths: Own tokens of each segment, in the order in which they lie.
        keys: Of each segment: where the tokens are that its last one sees.
        families: Segments of each family.
    """

    order: tuple[int, ...]
    places: list[NDArray[np.int64]]
    lengths: list[int]
    keys: list[NDArray[np.int64]]
    families: list[int]

    @property
    def total(self) -> int:
        """Tokens of all segments."""
        return sum(self.lengths)


def lay_out(samples: Sequence[int], lengths: Mapping[int, int], prefixes: Prefixes) -> Layout:
    """Samples that share nothing come first, sorted by length: attention joins segments of equal size.

    Args:
        samples: That are computed together.
        lengths: Tokens of each of them.
        prefixes: Of the samples of the rollout.
    """
    found = prefixes.among(samples)
    if not any(common for _, common in found):
        return _one_by_one(samples, lengths)
    families: list[list[tuple[int, int]]] = []
    for sample, common in found:
        if common:
            families[-1].append((sample, common))
        else:
            families.append([(sample, 0)])
    families.sort(key=lambda family: (len(family) > 1, sum(lengths[i] - c for i, c in family), family[0][0]))
    layout = Layout((), [], [], [], [])
    start = 0
    for family in families:
        own = {i: (common, lengths[i] - common) for i, common in family}
        segments = sorted((i for i in own if own[i][1]), key=own.__getitem__)
        starts = {}
        for i in segments:
            starts[i] = start
            start += own[i][1]
        places: dict[int, NDArray[np.int64]] = {}
        before = np.empty(0, np.int64)
        for i, common in family:
            first = starts.get(i, 0)
            added = np.arange(first, first + own[i][1])
            before = places[i] = np.concatenate([before[:common], added]) if common else added
        layout.places.extend(places.values())
        layout.lengths.extend(own[i][1] for i in segments)
        layout.keys.extend(places[i] for i in segments)
        layout.families.append(len(segments))
    return Layout(
        tuple(i for family in families for i, _ in family),
        layout.places, layout.lengths, layout.keys, layout.families,
    )  # fmt: skip


def _one_by_one(samples: Sequence[int], lengths: Mapping[int, int]) -> Layout:
    """The same where no sample shares anything; one without tokens has no segment."""
    order = sorted(samples, key=lambda i: (lengths[i], i))
    sizes = [lengths[i] for i in order]
    ends = np.cumsum([0, *sizes]).tolist()
    tokens = np.arange(ends[-1])
    places = [tokens[start:end] for start, end in pairwise(ends)]
    segments = [size for size in sizes if size]
    first = len(sizes) - len(segments)
    return Layout(tuple(order), places, segments, places[first:], [0] * first + [1] * len(segments))
