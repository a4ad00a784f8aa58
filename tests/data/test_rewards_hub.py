"""Built-in rewards: golden answers, what is not an answer, overrides by metadata, remote servers, shaping."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from rltrain.arguments.config import Config
from rltrain.functions import load_function
from rltrain.rewards import pool as rewards
from rltrain.rewards.remote import remote_rm
from rltrain.rewards.rules import RULES, reward_function_path
from rltrain.rewards.text import last_boxed
from rltrain.rollout.generate.timing import LoopLag
from rltrain.rollout.shaping import overlong, overlong_penalty
from rltrain.run.errors import UserError
from rltrain.sample import Sample


def make_config(rm_type: str = "exact", **changes: Any) -> Config:
    usual = {"reward_timeout": 10.0, "rollout_max_response_len": 100, "rewards_normalization": False}
    return Config.from_values({"rm_type": rm_type, **usual, **changes})


def path_of(config: Config, sample: Sample | None = None) -> str:
    return reward_function_path(config.functions, config.rewards, sample)


def grade(rm_type: str, response: str, label: Any, metadata: dict[str, Any] | None = None) -> Any:
    """What the reward function, found as a run finds it, returns."""
    config = make_config(rm_type, reward_key="score" if "dapo" in rm_type else None, rm_url="http://x")
    sample = Sample(response=response, label=label, metadata=metadata or {})
    return load_function(path_of(config, sample), flag="--rm-type")(config.namespace, sample)


@pytest.mark.parametrize(
    ("rm_type", "response", "label", "expected"),
    [
        ("exact", " 42\n", "42", 1),
        ("exact", "42.", "42", 0),
        ("math", r"so \boxed{\frac{1}{2}}", "0.5", 1),
        ("math", r"so \boxed{0.5}", r"\frac{1}{2}", 1),
        ("math", r"so \boxed{\{1,2\}}", r"\{2,1\}", 1),
        ("math", r"\boxed{3} no, \boxed{4}", "3", 0),
        ("math", "The answer is 12", "12", 1),
        ("math", r"\boxed{1,234}", "1234", 1),
        ("math", r"\boxed{2x+2}", "2(x+1)", 1),
        ("math", r"\boxed{x^2", "x^2 + 1", 0),
        ("math", "", "12", 0),
        ("deepscaler", r"<think>\boxed{1}</think> It is \boxed{2}", "2", 1),
        ("deepscaler", r"<think>\boxed{2}</think> It is 2", "2", 0),
        ("deepscaler", r"<think>\boxed{2}", "2", 0),
        ("deepscaler", r"\boxed{2}", "2", 1),
        ("f1", "the cat sat", "a cat sat down", 4 / 5),
        ("f1", "dog", "cat", 0),
        ("f1", "!!!", "", 1),
        ("regex", "x = 17 apples", r"\b17\b", 1),
        ("regex", "x = 170 apples", r"\b17\b", 0),
        ("boxed_exact", r"thus \boxed{42}.", "42", 1),
        ("boxed_exact", "thus 42", "42", 0),
        ("boxed_f1", r"\boxed{cat sat}", "cat sat", 1),
    ],
)
def test_golden_answers(rm_type: str, response: str, label: str, expected: float) -> None:
    assert grade(rm_type, response, label) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "label", "metadata", "expected"),
    [
        ("The answer is (C).", "C", {}, 1),
        ("Answer: b", "B", {}, 0),  # a small letter is a word, not a choice
        (r"A or B? \boxed{\text{B}}", "B", {}, 1),
        ("<think>A, A, A</think> **B**", "B", {}, 1),
        ("<think>B", "B", {}, 0),
        ("Answer: D", "blue", {"choices": ["red", "green", "black", "blue"]}, 1),
        ("I'd say E. Answer: A", "A", {"valid_letters": ["A", "B"]}, 1),
        ("no letter here", "A", {}, 0),
    ],
)
@pytest.mark.parametrize("rm_type", ["gpqa", "multiple_choice"])
def test_multiple_choice(
    rm_type: str, response: str, label: str, metadata: dict[str, Any], expected: float
) -> None:
    assert grade(rm_type, response, label, metadata) == expected


def test_a_choice_that_does_not_exist_is_an_error_in_the_data() -> None:
    with pytest.raises(ValueError, match="'purple' is neither"):
        grade("gpqa", "A", "purple", {"choices": ["red"]})


@pytest.mark.parametrize(
    ("response", "score", "pred"),
    [
        ("Answer: 12\nAnswer: $\\frac{3}{4}$.", 1, r"\frac{3}{4}"),
        (r"Answer: \boxed{\dfrac{3}{4}}", 1, r"\frac{3}{4}"),
        ("Answer: 3/4", -1, "3/4"),
        ("Answer: \\frac{3}{4}" + " pad" * 100, -1, ""),
    ],
)
def test_dapo(response: str, score: float, pred: str) -> None:
    result = grade("dapo", response, r"\frac34".replace("34", "{3}{4}"))
    assert (result["score"], result["pred"], result["acc"]) == (score, pred, float(score > 0))


@pytest.mark.slow
def test_reasoning_gym_asks_the_tasks_own_verifier() -> None:
    import reasoning_gym

    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1)[0]
    metadata = json.loads(json.dumps(entry["metadata"]))
    assert grade("reasoning_gym", entry["answer"], entry["answer"], metadata) == 1
    assert grade("reasoning_gym", f"well <answer>{entry['answer']}</answer>", entry["answer"], metadata) == 1
    assert grade("reasoning_gym", "999999", entry["answer"], metadata) < 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{a{b}c}", "a{b}c"), (r"\boxed{1} \boxed{2}", "2"), (r"\boxed{1} \boxed{2", "1"),
        (r"\fbox {7}", "7"), ("none", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_complete_box_counts(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


def test_every_name_is_a_function_and_boxed_or_not() -> None:
    for name in RULES:
        config = make_config(name, rm_url="http://x", reward_key="score")
        assert callable(load_function(path_of(config), flag="--rm-type"))
        config = config.replace(rm_type=f"boxed_{name}")
        assert path_of(config) == "rltrain.rewards.rules.boxed"


@pytest.mark.parametrize(
    ("rm_type", "words"),
    [("remote_rm", "--rm-url"), ("dapo", "--reward-key score"), ("boxed_nothing", "boxed_nothing: there is no")],
)  # fmt: skip
def test_what_a_reward_needs_is_asked_for_before_anything_starts(rm_type: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        path_of(make_config(rm_type))


def test_metadata_gives_a_sample_another_reward() -> None:
    samples = [
        Sample(response="the cat", label="cat"),
        Sample(response="the cat", label="cat", metadata={"rm_type": "f1"}),
        Sample(response=r"\boxed{cat}", label="cat", metadata={"rm_type": "boxed_exact"}),
    ]

    async def use() -> None:
        try:
            await asyncio.gather(*(rewards.grade(make_config(), sample) for sample in samples))
        finally:
            await rewards.close()

    asyncio.run(use())
    assert [sample.reward for sample in samples] == [0, 1, 1]
    assert all(sample.reward_seconds > 0 for sample in samples)


def ask_server(answers: list[web.Response]) -> tuple[Any, list[Any]]:
    """What `remote_rm` makes of a server that gives these answers, and the requests that it got."""
    seen: list[Any] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(await request.json())
        return answers[len(seen) - 1]

    async def use() -> Any:
        app = web.Application()
        app.add_routes([web.post("/grade", handle)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        try:
            config = make_config("remote_rm", rm_url=f"http://{host}:{port}/grade")
            sample = Sample(prompt="p", response="r", label="l", metadata={"a": 1})
            return await remote_rm(config.namespace, sample)
        finally:
            await runner.cleanup()

    return asyncio.run(use()), seen


def test_a_remote_reward_is_asked_for_again_while_the_server_is_away() -> None:
    reward, seen = ask_server([web.Response(status=503), web.json_response({"score": 0.5})])
    assert reward == {"score": 0.5}
    assert seen == [{"prompt": "p", "response": "r", "label": "l", "metadata": {"a": 1}}] * 2


def test_a_remote_reward_that_is_refused_says_why() -> None:
    with pytest.raises(RuntimeError, match="422 no such task"):
        ask_server([web.Response(status=422, text="no such task")])


def test_overlong_penalty_grows_over_the_buffer_only() -> None:
    lengths = [0, 80, 90, 100, 120]
    assert [overlong_penalty(n, 100, 20, 1.0) for n in lengths] == [0, 0, -0.5, -1, -1]
    samples = [
        Sample(index=i, group_index=0, reward=1.0, response_length=n, status=Sample.Status.COMPLETED)
        for i, n in enumerate(lengths)
    ]
    samples[0].status = Sample.Status.FAILED
    raw, shaped = overlong(make_config(overlong_penalty_factor=2.0).namespace, samples)
    assert raw == [None, 1, 1, 1, 1]
    assert shaped == [0, 1, 0, -1, -1]


def test_what_blocks_the_event_loop_shows_as_lag() -> None:
    import time

    async def use() -> dict[str, float]:
        async with LoopLag() as lag:
            await asyncio.sleep(0.05)
            time.sleep(0.2)
            await asyncio.sleep(0.05)
        return lag.metrics()

    assert asyncio.run(use())["perf/loop_lag_max"] > 0.1
