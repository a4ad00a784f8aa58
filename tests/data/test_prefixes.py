"""What samples share at their beginnings, how they are laid out, and how they are packed."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.data.packing import pack_ranks, plan_step
from rltrain.data.prefixes import Prefixes, lay_out
from rltrain.data.tree_packing import pack_tree, tree_size

# Few different tokens, so that much is shared.
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12)


def arrays(tokens: list[list[int]]) -> list[np.ndarray]:
    return [np.array(each, np.int32) for each in tokens]


def distinct(tokens: list[list[int]]) -> int:
    """Beginnings of any length that there are: the tokens that have to be computed."""
    return len({tuple(each[:end]) for each in tokens for end in range(1, len(each) + 1)})


@given(sequences, st.data())
@settings(deadline=None)
def test_what_is_shared_is_counted_once(tokens: list[list[int]], data: st.DataObject) -> None:
    prefixes = Prefixes.of(arrays(tokens), least=1)
    some = data.draw(st.lists(st.sampled_from(range(len(tokens))), unique=True))
    chosen = [tokens[i] for i in some]
    lengths = [len(each) for each in tokens]
    assert tree_size(lengths, prefixes, some) == distinct(chosen)
    assert prefixes.subset(some).shared(range(len(some))) == prefixes.shared(some)


@given(sequences, st.integers(1, 4))
@settings(deadline=None)
def test_every_token_lies_where_it_and_all_before_it_are(tokens: list[list[int]], least: int) -> None:
    prefixes = Prefixes.of(arrays(tokens), least)
    layout = lay_out(range(len(tokens)), {i: len(each) for i, each in enumerate(tokens)}, prefixes)
    packed: dict[int, tuple[int, ...]] = {}
    for i, places in zip(layout.order, layout.places, strict=True):
        assert len(places) == len(tokens[i])
        for end, place in enumerate(places.tolist(), 1):
            assert packed.setdefault(place, tuple(tokens[i][:end])) == tuple(tokens[i][:end])
    assert sorted(packed) == list(range(layout.total))
    assert layout.total == tree_size([len(each) for each in tokens], prefixes, range(len(tokens)))
    assert sum(layout.families) == len(layout.lengths) == len(layout.keys)
    start = 0
    for length, keys in zip(layout.lengths, layout.keys, strict=True):
        start += length
        assert keys[-length:].tolist() == list(range(start - length, start))  # its own are the last it sees


def test_samples_that_lie_far_apart_share_the_least_of_what_is_between_them() -> None:
    rng = np.random.default_rng(0)
    common = (0, *rng.integers(1, 1000, 299).tolist())
    order = tuple(rng.permutation(300).tolist())
    place = tuple(order.index(sample) for sample in range(300))
    prefixes = Prefixes(order, common, place)
    for count in (2, 3, 20, 100, 300):
        chosen = rng.choice(300, count, replace=False).tolist()
        found = prefixes.among(chosen)
        assert [sample for sample, _ in found] == sorted(chosen, key=lambda sample: place[sample])
        assert found[0][1] == 0
        for (before, _), (sample, shared) in pairwise(found):
            assert shared == min(common[place[before] + 1 : place[sample] + 1])


def test_a_short_beginning_is_not_shared() -> None:
    tokens = arrays([[1] * 7 + [2], [1] * 7 + [3]])
    assert Prefixes.of(tokens).shared([0, 1]) == 0
    assert Prefixes.of(tokens, least=7).shared([0, 1]) == 7


@pytest.mark.slow
@given(sequences, st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.booleans())
@settings(deadline=None)
def test_plans_keep_to_the_budget(
    tokens: list[list[int]], budget: int, ranks: int, multiple: int, packed: bool
) -> None:
    prefixes = Prefixes.of(arrays(tokens), least=1)
    lengths = [len(each) for each in tokens]
    how = {"max_tokens": budget if packed else None, "micro_batch_size": 2, "multiple": multiple}
    plan = plan_step(lengths, ranks, prefixes=prefixes, **how)  # type: ignore[arg-type]
    dealt = [[i for each in rank for i in each] for rank in plan.micro_batches]
    assert sorted(i for rank in dealt for i in rank) == list(range(len(tokens)))
    again = pack_ranks(lengths, dealt, prefixes=prefixes, **how)  # type: ignore[arg-type]
    for each in (plan, again):
        assert len(each.micro_batches) == ranks and each.num_micro_batches % multiple == 0
        for rank in each.micro_batches:
            assert len(rank) == each.num_micro_batches
            for micro_batch in rank:
                if packed:  # a sample that is too long by itself may have its own beginnings with it
                    longest = max((lengths[i] for i in micro_batch), default=0)
                    assert tree_size(lengths, prefixes, micro_batch) <= max(budget, longest)
                else:
                    assert len(micro_batch) <= 2
    assert [sorted(i for each in rank for i in each) for rank in again.micro_batches] == [
        sorted(rank) for rank in dealt
    ]


@pytest.mark.parametrize("head", [0, 500])
def test_groups_are_cut_only_to_fill_micro_batches(head: int) -> None:
    """Near the least number of micro-batches, also where all groups share the beginning of their prompts."""
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.lognormal(5, 0.5, 64), 16, 2000).astype(int)
    responses = np.clip(rng.lognormal(6.5, 0.9, (64, 8)), 16, 7000).astype(int)
    lengths = (head + prompts[:, None] + responses).flatten().tolist()
    common = [
        0 if i == 0 else head if i % 8 == 0 else head + int(prompts[i // 8]) for i in range(len(lengths))
    ]
    order = tuple(range(len(lengths)))
    bins = pack_tree(lengths, Prefixes(order, tuple(common), order), 8192)
    assert sorted(i for each in bins for i in each) == list(order)
    assert (responses.sum() + prompts.sum()) / (8192 - head) / len(bins) > 0.95


def test_groups_with_short_prompts_reach_the_bound() -> None:
    """128 groups of 8 at a cap of 8192: within a hundredth of micro-batches that are filled to the last token."""
    shares = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        prompts = np.clip(rng.lognormal(5, 0.5, 128), 16, 2048).astype(int)
        responses = np.clip(rng.lognormal(6.5, 0.9, (128, 8)), 16, 8192 - prompts[:, None]).astype(int)
        lengths = (prompts[:, None] + responses).flatten().tolist()
        order = tuple(range(len(lengths)))
        common = tuple(0 if i % 8 == 0 else int(prompts[i // 8]) for i in order)
        bins = pack_tree(lengths, Prefixes(order, common, order), 8192)
        pieces = np.ceil(responses.sum(1) / (8192 - prompts))  # a prompt is there once in each
        shares.append(math.ceil((pieces * prompts + responses.sum(1)).sum() / 8192) / len(bins))
    assert np.mean(shares) >= 0.99, shares


def test_ranks_get_even_shares_of_a_few_groups() -> None:
    lengths, order = [130] * 32, tuple(range(32))
    prefixes = Prefixes(order, tuple(0 if i % 8 == 0 else 100 for i in range(32)), order)
    plan = plan_step(lengths, 4, max_tokens=8192, prefixes=prefixes)
    assert [sum(tree_size(lengths, prefixes, each) for each in rank) for rank in plan.micro_batches] == [
        340
    ] * 4
