"""Changes of weights, by element: what is sent of them gives, bit for bit, what sending everything would have given."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.weights.buckets import Part, lay_out, write
from rltrain.weights.delta import Sent, apply, change

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def applied(part: Part, before: torch.Tensor) -> torch.Tensor:
    """What an engine makes of it."""
    pieces = lay_out([Part.whole("before it", torch.zeros(3)), part], start=512)
    buffer = torch.zeros(pieces[-1].end, dtype=torch.uint8)
    write([Part.whole("before it", torch.zeros(3)), part], pieces, buffer)
    if part.changed is None:
        return pieces[1].of(buffer)
    after = before.clone()
    apply(pieces[1], buffer, after)
    apply(pieces[1], buffer, after)  # twice is no harm
    return after


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.sampled_from([(1,), (7, 3), (40, 60), (3, 1000)]),
    share=st.sampled_from([0.0, 0.001, 0.01, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_changes_give_what_was_there(
    seed: int, shape: tuple[int, ...], share: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(shape, generator=generator).to(dtype)
    new = torch.randn(shape, generator=generator).to(dtype)
    after = torch.where(torch.rand(shape, generator=generator) < share, new, before)
    part = change("w", before, after)
    if part is None:
        assert bits(after) == bits(before)
    else:
        assert bits(applied(part, before)) == bits(after) != bits(before)
        assert part.data.nbytes <= after.nbytes


def test_only_a_few_bytes_are_sent_of_a_few_changes() -> None:
    before = torch.zeros(1_000_000, dtype=torch.bfloat16)
    after = before.clone()
    after[::200] = 1.0
    part = change("w", before, after)
    assert part is not None and part.changed == 5_000
    assert part.data.nbytes == 5_000 * 3
    after = before.clone()
    after[-1] = 1.0  # with one in 255 in between, from the start on
    part = change("w", before, after)
    assert part is not None and part.changed == -(-1_000_000 // 255)
    assert bits(applied(part, before)) == bits(after)


def test_bits_count_and_not_values() -> None:
    before = torch.tensor([0.0, float("nan"), 1.0] * 100)
    assert change("w", before, before.clone()) is None
    after = before.clone()
    after[0] = -0.0
    part = change("w", before, after)
    assert part is not None and bits(applied(part, before)) == bits(after)


def test_what_has_been_sent_is_known_from_then_on() -> None:
    sent = Sent()
    weights = {"a": torch.zeros(100, 10), "b": torch.ones(1000), "c": torch.ones(5)}
    assert [part.changed for part in sent.whole(weights.items())] == [None] * 3
    weights["a"][3, 3] = 1.0
    weights["c"] += 1.0
    parts = list(sent.changes(weights.items()))
    assert [(part.name, part.changed is None) for part in parts] == [("a", False), ("c", True)]
    assert list(sent.changes(weights.items())) == []
    weights["b"][7] = 0.0
    assert [part.name for part in sent.changes(weights.items())] == ["b"]
    assert len(list(sent.whole(weights.items()))) == 3
