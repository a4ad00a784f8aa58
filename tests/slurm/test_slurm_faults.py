"""The faults of a storm as values: drawn, written, read, and made fewer. tests/slurm/test_slurm_chaos.py has storms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.chaos.actions import Weather
from hpc.chaos.faults import KINDS, Fault, draw, parse
from hpc.chaos.roles import FIRST_VALUE, curve, next_value
from hpc.chaos.shrink import shrink
from rltrain.run.errors import UserError


@given(st.integers(0, 10_000), st.integers(1, 20))
def test_a_seed_is_a_storm_that_can_be_written_and_read(seed: int, count: int) -> None:
    faults = draw(seed, count, steps=60)
    assert faults == draw(seed, count, steps=60) and len(faults) == count
    assert parse([str(fault) for fault in faults]) == faults
    assert all(1 <= fault.step < 60 for fault in faults)


def test_a_thousand_faults_are_of_every_kind_and_some_come_within_a_second() -> None:
    faults = draw(1, 1000, steps=60)
    assert {fault.kind for fault in faults} == set(KINDS)
    others = draw(2, 1000, steps=60)
    assert faults != others


def test_each_kind_can_be_done() -> None:
    assert all(hasattr(Weather, "_" + kind.replace("-", "_")) for kind in KINDS)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("kill", "not a fault like"),
        ("explode@3", "Kinds: kill"),
        ("kill@3", "kill takes router-0"),
        ("kill:node1@3", "kill takes router-0"),
        ("requeue:engine-0@3", "requeue takes no target"),
    ],
)
def test_a_word_that_says_no_fault_is_refused(word: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse([word])


@given(st.sets(st.integers(0, 11), min_size=1, max_size=3))
def test_fewer_faults_that_still_do_it(guilty: set[int]) -> None:
    faults = [Fault("requeue", step) for step in range(12)]

    def fails(left: tuple[Fault, ...]) -> bool:
        return guilty <= {fault.step for fault in left}

    assert {fault.step for fault in shrink(faults, fails, tries=1000)} == guilty


def test_a_storm_that_does_not_fail_again_stays_as_it_is() -> None:
    faults = draw(1, 6, steps=60)
    assert shrink(faults, lambda left: False) == faults


def test_the_curve_shows_a_step_that_is_lost_or_trained_twice() -> None:
    whole = curve(10)
    assert len(set(whole)) == 10
    lost = curve(9)
    assert lost == whole[:9] and next_value(FIRST_VALUE) / (2**31 - 1) == whole[0]
