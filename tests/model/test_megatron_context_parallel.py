"""Which tokens a context parallel rank has, and that no share of the work is larger than another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rltrain.megatron.model.context_parallel import own_positions, positions_in_sequence, whole_order

pytestmark = pytest.mark.slow

LENGTHS = [8, 16, 24]


def test_two_ranks_take_the_outer_and_the_inner_chunks() -> None:
    assert own_positions([8, 4], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert own_positions([8, 4], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_token_is_one_ranks_and_causal_work_is_even(size: int) -> None:
    owned = [own_positions(LENGTHS, size, rank) for rank in range(size)]
    assert sorted(np.concatenate(owned).tolist()) == list(range(sum(LENGTHS)))
    starts = np.repeat(np.cumsum([0, *LENGTHS[:-1]]), LENGTHS)
    work = [int((positions - starts[positions] + 1).sum()) for positions in owned]
    assert len(set(work)) == 1
    assert np.concatenate(owned)[whole_order(LENGTHS, size)].tolist() == list(range(sum(LENGTHS)))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_places_in_the_sequence(size: int) -> None:
    offsets = torch.tensor([0, 8, 24, 48], dtype=torch.int32)
    in_sequence = torch.cat([torch.arange(length) for length in LENGTHS]).numpy()
    for rank in range(size):
        expected = in_sequence[own_positions(LENGTHS, size, rank)]
        assert positions_in_sequence(offsets, 48 // size, size, rank).tolist() == expected.tolist()
