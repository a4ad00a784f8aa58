"""The tree of turns: each sampled token is trained once, after the tokens that the engine saw before it."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from fakes.agents import log_prob
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.agents.trajectory import Sampled, Trajectory, to_samples
from rltrain.sample import Sample

# Few different tokens, so that unrelated prompts share beginnings by chance.
TOKENS = st.lists(st.integers(0, 2), max_size=4)
STATUS = st.sampled_from([Sample.Status.COMPLETED, Sample.Status.TRUNCATED])
# Which held turn a request goes on from (None: it begins anew), how many of its last tokens are cut off, what is added.
REQUESTS = st.lists(
    st.tuples(
        st.none() | st.integers(0, 20),
        st.just(0) | st.integers(0, 6),
        TOKENS,
        st.lists(st.integers(0, 2), min_size=1, max_size=4),
        STATUS,
        st.booleans(),
    ),
    max_size=14,
)


def respond(
    trajectory: Trajectory,
    prompt: list[int],
    tokens: list[int],
    number: int,
    status: Any = Sample.Status.COMPLETED,
) -> int:
    """A response with log-probs that no other place has, half by each of two versions of the weights."""
    log_probs = [log_prob([*prompt, *tokens[:i]], token) for i, token in enumerate(tokens)]
    half = len(tokens) // 2
    spans = [
        {"version": f"{number}", "start": 0, "end": half},
        {"version": f"{number + 1}", "start": half, "end": len(tokens)},
    ]
    return trajectory.add(prompt, Sampled(tokens, log_probs, spans, status)).number


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(REQUESTS)
def test_each_sampled_token_is_trained_once_after_what_the_engine_saw(requests: list[Any]) -> None:
    trajectory = Trajectory()
    asked: list[tuple[tuple[int, ...], tuple[int, ...], str]] = []
    for base, cut, added, tokens, status, arrived in requests:
        prompt = [0]
        if base is not None and trajectory.turns:
            numbers = sorted(trajectory.turns)
            prompt = list(trajectory.tokens(numbers[base % len(numbers)]))
            prompt = prompt[: max(1, len(prompt) - cut)]
        prompt += added
        number = respond(trajectory, prompt, tokens, len(asked), status)
        if arrived:
            asked.append((tuple(prompt), tuple(tokens), f"{len(asked)}"))
        else:
            trajectory.discard(number)
    samples = to_samples(trajectory, Sample(index=7, prompt="task"), lambda ids: "x" * len(ids))
    trained: list[tuple[tuple[int, ...], int]] = []
    for sample in samples:
        assert sample.rollout_id == 7 and sample.response == "x" * sample.response_length
        assert len(sample.loss_mask or []) == len(sample.rollout_log_probs or []) == sample.response_length
        start = sample.prompt_length
        for i, (mask, value) in enumerate(
            zip(sample.loss_mask or [], sample.rollout_log_probs or [], strict=True)
        ):
            prefix, token = sample.tokens[: start + i], sample.tokens[start + i]
            versions = [each for each in sample.weight_version_spans if each["start"] <= i < each["end"]]
            assert len(versions) == mask  # who wrote it is known of what was sampled, and of that only
            if mask:
                assert value == log_prob(prefix, token)
                trained.append((tuple(prefix), token))
            else:
                assert value == 0.0
        assert sample.loss_mask and sample.loss_mask[0] == 1 and sample.loss_mask[-1] == 1
    expected = [(prompt + tokens[:i], token) for prompt, tokens, _ in asked for i, token in enumerate(tokens)]
    assert sorted(trained) == sorted(expected)


def test_a_prompt_that_extends_a_turn_goes_on_from_the_deepest_one() -> None:
    trajectory = Trajectory()
    first = respond(trajectory, [1, 2], [3, 4], 0)
    second = respond(trajectory, [1, 2, 3, 4, 5], [6], 1)
    assert trajectory.find([1, 2, 3, 4, 5, 6, 7]) == second
    assert trajectory.find([1, 2, 3, 4, 9]) == first
    assert trajectory.find([1, 2, 3]) is None  # not even the first turn is whole
    retry = respond(trajectory, [1, 2, 3, 4, 5], [8], 2)
    assert trajectory.turns[retry].parent == first
    samples = to_samples(trajectory, Sample(index=0, rollout_id=5), lambda ids: "")
    assert [(each.tokens, each.loss_mask) for each in samples] == [
        ([1, 2, 3, 4, 5, 6], [1, 1, 0, 1]),
        ([1, 2, 3, 4, 5, 8], [1]),  # what both share is trained in the first
    ]
    assert [each.rollout_id for each in samples] == [5, 5]
    assert [each.weight_versions for each in samples] == [["0", "1", "2"], ["2", "3"]]


def test_a_response_that_never_arrived_is_forgotten_unless_the_agent_went_on() -> None:
    trajectory = Trajectory()
    first = respond(trajectory, [1], [2], 0)
    second = respond(trajectory, [1, 2], [3], 1)
    trajectory.discard(first)
    assert sorted(trajectory.turns) == [first, second]
    trajectory.discard(second)
    trajectory.discard(first)
    assert not trajectory.turns and not trajectory.paths() and trajectory.find([1, 2]) is None


def test_what_was_not_sampled_is_not_held() -> None:
    trajectory = Trajectory()
    for tokens, log_probs in (([], []), ([1, 2], [-0.5])):
        with pytest.raises(ValueError, match="log-probs"):
            trajectory.add([1], Sampled(tokens, log_probs))
    assert trajectory.tokens(respond(trajectory, [1], [2], 0)) == array("i", [1, 2])
