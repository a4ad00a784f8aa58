"""Packing and the plan of a step: every sequence once, budgets kept, ranks even, close to the lower bound."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rltrain.data.packing import StepPlan, pack, pack_ranks, plan_step

LENGTHS = st.lists(st.integers(1, 120), max_size=60)


def indices_of(plan: StepPlan) -> list[int]:
    return sorted(i for rank in plan.micro_batches for micro_batch in rank for i in micro_batch)


@given(LENGTHS, st.integers(1, 100))
def test_pack_places_every_sequence_once_within_the_capacity(lengths: list[int], capacity: int) -> None:
    bins = pack(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    for b in bins:
        assert len(b) == 1 or sum(lengths[i] for i in b) <= capacity


@given(LENGTHS, st.integers(1, 5), st.integers(1, 150))
def test_plan_is_complete_and_even_over_ranks(lengths: list[int], ranks: int, budget: int) -> None:
    plan = plan_step(lengths, ranks, max_tokens=budget)
    assert len(plan.micro_batches) == ranks
    assert {len(rank) for rank in plan.micro_batches} == {plan.num_micro_batches}
    assert indices_of(plan) == list(range(len(lengths)))
    for rank in plan.micro_batches:
        for micro_batch in rank:
            assert len(micro_batch) <= 1 or sum(lengths[i] for i in micro_batch) <= budget
    assert plan == plan_step(lengths, ranks, max_tokens=budget)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 8))
def test_plan_by_sequences(lengths: list[int], ranks: int, size: int) -> None:
    plan = plan_step(lengths, ranks, micro_batch_size=size)
    assert {len(rank) for rank in plan.micro_batches} == {plan.num_micro_batches}
    assert indices_of(plan) == list(range(len(lengths)))
    assert max((len(b) for rank in plan.micro_batches for b in rank), default=0) <= size


@given(st.lists(st.integers(1, 120), min_size=1, max_size=60), st.integers(1, 4))
def test_a_micro_batch_is_empty_only_when_there_are_too_few_sequences(lengths: list[int], ranks: int) -> None:
    plan = plan_step(lengths, ranks, max_tokens=130)
    empty = sum(not micro_batch for rank in plan.micro_batches for micro_batch in rank)
    assert empty == max(0, ranks * plan.num_micro_batches - len(lengths))


@given(LENGTHS, st.integers(1, 5), st.integers(1, 150), st.integers(1, 4))
def test_micro_batches_come_in_multiples(lengths: list[int], ranks: int, budget: int, multiple: int) -> None:
    for options in ({"max_tokens": budget}, {"micro_batch_size": 3}):
        plan = plan_step(lengths, ranks, multiple=multiple, **options)
        assert {len(rank) % multiple for rank in plan.micro_batches} == {0}
        assert indices_of(plan) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 4), st.integers(1, 150), st.integers(1, 3))
def test_packing_again_keeps_every_sequence_on_its_rank(
    lengths: list[int], count: int, budget: int, multiple: int
) -> None:
    ranks = [list(range(len(lengths)))[rank::count] for rank in range(count)]
    plan = pack_ranks(lengths, ranks, max_tokens=budget, multiple=multiple)
    assert [sorted(i for each in rank for i in each) for rank in plan.micro_batches] == ranks
    assert {len(rank) for rank in plan.micro_batches} == {plan.num_micro_batches}
    for rank in plan.micro_batches:
        for each in rank:
            assert len(each) <= 1 or sum(lengths[i] for i in each) <= budget


def test_costs_are_evened_out_and_not_tokens() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1, 512).astype(int).clip(1, 8192).tolist()
    costs = [length * (length + 1000) for length in lengths]
    plan = plan_step(lengths, 8, max_tokens=8192, costs=costs)
    by_cost, by_tokens = (
        [sum(values[i] for b in rank for i in b) for rank in plan.micro_batches]
        for values in (costs, lengths)
    )
    assert max(by_cost) <= 1.01 * np.mean(by_cost)
    assert max(by_tokens) > 1.05 * np.mean(by_tokens)


def test_a_sequence_over_the_budget_is_alone() -> None:
    plan = plan_step([500, 10, 10, 10], 1, max_tokens=100)
    assert (0,) in plan.micro_batches[0]


def test_packing_is_close_to_the_lower_bound() -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(5):
        lengths = np.clip(rng.lognormal(6.5, 0.9, 1024), 16, 8192).astype(int).tolist()
        ratios.append(math.ceil(sum(lengths) / 8192) / len(pack(lengths, 8192)))
    assert np.mean(ratios) >= 0.99


def test_ranks_get_nearly_equal_tokens() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1, 512).astype(int).clip(1, 8192).tolist()
    plan = plan_step(lengths, 8, max_tokens=8192)
    loads = [sum(lengths[i] for b in rank for i in b) for rank in plan.micro_batches]
    assert max(loads) <= 1.005 * np.mean(loads)
