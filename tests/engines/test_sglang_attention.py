"""`rltrain.sglang.attention` against attention of one request after the other."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rltrain.sglang.attention import attend, cache_entries

LENGTHS = torch.tensor([1, 7, 4, 8])
HEADS, GROUPS, SIZE = 6, 2, 16


def test_a_batch_attends_as_each_request_alone() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 64, GROUPS, SIZE)
    query = torch.randn(len(LENGTHS), HEADS, SIZE)
    # What is behind a request's end in SGLang's table may lie outside of the cache.
    table = torch.full((9, 12), 10_000)
    requests = torch.tensor([5, 0, 3, 8])
    places = torch.randperm(63)[: int(LENGTHS.sum())] + 1
    for request, entries in zip(requests, places.split(LENGTHS.tolist()), strict=True):
        table[request, : len(entries)] = entries
    found = cache_entries(table, requests, LENGTHS)
    assert found is not None

    got = attend(query, keys, values, *found, scale=0.3)

    for row, entries in enumerate(places.split(LENGTHS.tolist())):
        alone = scaled_dot_product_attention(
            query[row][:, None],
            keys[entries].transpose(0, 1),
            values[entries].transpose(0, 1),
            enable_gqa=True,
            scale=0.3,
        )
        assert (got[row] - alone[:, 0]).abs().max() < 1e-6


@pytest.mark.parametrize(("lengths", "is_worth_it"), [([10, 10, 10], True), ([500, 2, 2, 2], False)])
def test_padding_that_outweighs_the_tokens_is_not_made(lengths: list[int], is_worth_it: bool) -> None:
    table = torch.zeros(4, 512, dtype=torch.int32)
    found = cache_entries(table, torch.arange(len(lengths)), torch.tensor(lengths))
    assert (found is not None) == is_worth_it
