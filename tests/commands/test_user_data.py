"""Data of users' functions and files, as odd as it comes: it is converted, or its own sample fails; the run goes on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rltrain.arguments.config import Config
from rltrain.data.prompt_file import PromptFile
from rltrain.functions import explain
from rltrain.rewards.pool import RewardPool
from rltrain.rewards.worker import Grade
from rltrain.run.errors import UserError
from rltrain.run.plain import plain_json, plain_metrics, plain_number
from rltrain.sample import Sample
from rltrain.schema import read_metrics, samples_to_table, table_to_samples

HALF = "half \ud800 of a character"
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1), (0.5, 0.5), (True, 1.0), (np.float32(0.5), 0.5), (np.int64(3), 3), (np.bool_(True), 1.0),
        (np.array([2.0]), 2.0), (2**60, float(2**60)), (10**400, float("inf")),
        ("1", None), (None, None), (b"1", None), (np.array([1, 2]), None), ([1], None),
    ],
)  # fmt: skip
def test_numbers(value: Any, expected: float | None) -> None:
    assert plain_number(value) == expected


def test_metrics_that_are_no_numbers_are_named() -> None:
    said: list[str] = []
    given = {"a": np.float32(0.25), "b": "many", 3: np.int8(4), HALF: 1}
    assert plain_metrics(given, "mine.log", said.append) == {
        "a": 0.25,
        "3": 4,
        HALF.replace("\ud800", "?"): 1,
    }
    assert said == ["mine.log: the metric 'b' is 'many'; expected a number: left out"]
    assert plain_metrics(3, "mine.log", said.append) == {}
    assert said[1] == "mine.log: the metrics are a int; expected a dict: left out"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": np.float32(0.5), "b": np.arange(2)}, {"a": 0.5, "b": [0, 1]}),
        ({"a": float("nan"), "b": np.float64("inf")}, {"a": None, "b": None}),
        ({(1, 2): b"\xff", np.int64(3): {1}}, {"(1, 2)": "\ufffd", "3": [1]}),
        ({"a": HALF, HALF: 10**30}, {"a": HALF.replace("\ud800", "?"), HALF.replace("\ud800", "?"): 10**30}),
        ({"p": Path("x")}, {"p": "x"}),
    ],
)
def test_json_that_every_reader_takes(value: Any, expected: Any) -> None:
    assert json.loads(plain_json(value), parse_constant=pytest.fail) == expected
    plain_json(value).encode()


def test_what_holds_itself_becomes_text() -> None:
    assert "nested too deep" in plain_json(LOOP)


def test_a_batch_of_odd_samples_is_stored() -> None:
    """A failure, a label, metadata, a dict reward and metrics that JSON or Arrow would not take as they are."""
    odd = Sample(
        index=0, group_index=0, prompt=HALF, response=HALF, label={"answer": np.int64(42)}, failure=HALF,
        status=Sample.Status.FAILED, tokens=[1, 2], response_length=1, weight_versions=[HALF],
        reward={"score": np.float32(0.5), "pred": {1}}, metadata={("a", 1): float("nan"), "b": b"\xff", "c": HALF},
    )  # fmt: skip
    metrics = {"rollout/mine": np.float32(0.5)}
    table = samples_to_table([odd], step=0, attempt=0, dataset="train", rewards=[None], metrics=metrics)
    assert read_metrics(table.schema) == {"rollout/mine": 0.5}
    [sample] = table_to_samples(table)
    assert sample.response == sample.failure == HALF.replace("\ud800", "?")
    assert sample.metadata == {"('a', 1)": None, "b": "\ufffd", "c": HALF.replace("\ud800", "?")}
    assert sample.reward == {"score": 0.5, "pred": [1]}


REWARDS = """
async def raises_half(args, sample):
    raise ValueError("half \\ud800 of a character")

async def leaves_a_function(args, sample):
    sample.metadata["f"] = lambda: 1
    return 1.0

def returns_a_function(args, sample):
    return {"score": 1.0, "f": lambda: 1}
"""


@pytest.mark.parametrize(
    ("function", "metadata", "reason"),
    [
        ("raises_half", {}, r"ValueError: half \ud800 of a character"),
        ("leaves_a_function", {}, "can't be pickled"),
        ("returns_a_function", {}, "can't be pickled"),
        ("leaves_a_function", {"f": lambda: 1}, "can't be sent"),
    ],
)
def test_a_reward_fails_its_own_sample_only(
    function: str, metadata: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    async def grade() -> list[Grade]:
        config = Config.from_values({"reward_timeout": 60.0, "reward_num_workers": 1})
        pool = await RewardPool.start(config, f"odd_rewards.{function}")
        try:
            return [await pool.grade(Sample(index=0, metadata=metadata)), await pool.grade(Sample(index=1))]
        finally:
            await pool.close()

    grade_of_odd, other = asyncio.run(grade())
    assert reason in (grade_of_odd.failure or "")
    (grade_of_odd.failure or "").encode()
    assert other.reward == 1.0 or "can't be sent" not in (other.failure or "")  # its process still answers


def test_what_is_said_can_be_written_to_a_log() -> None:
    explain(ValueError(HALF)).encode()


def test_half_a_character_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"input": "\\ud83c\\udf88"}\n{"input": "x \\ud83c"}\n')
    prompts = PromptFile(str(file), "input")
    assert prompts[0].prompt == "🎈"
    with pytest.raises(UserError, match=r"p.jsonl:2: the text has \\ud83c, half a character"):
        list(prompts)


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"input": "é"}\n{"input": "b"}\n', encoding="utf-8-sig")
    prompts = PromptFile(str(file), "input")
    assert [prompt.prompt for prompt in prompts] == ["é", "b"]
    assert prompts[0].prompt == "é"
