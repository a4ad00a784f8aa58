"""The demo's task: the arithmetic, the careless teacher, the files and the tokenizer."""

from __future__ import annotations

import asyncio
import json
import random
from argparse import Namespace
from pathlib import Path

import pytest

from rltrain.demo import assets, task
from rltrain.sample import Sample


def test_solutions_are_right_with_the_carry_and_ten_short_without() -> None:
    for problem in task.make_problems(500, seed=1):
        right = int(task.solution(problem, forget_carry=False).split(",")[-1])
        forgot = int(task.solution(problem, forget_carry=True).split(",")[-1])
        assert right == sum(problem)
        assert forgot == sum(problem) - 10 * task.carries(problem)


def test_teacher_forgets_the_stated_share() -> None:
    rng = random.Random(0)
    carrying = [p for p in task.make_problems(3000, seed=2) if task.carries(p)]
    wrong = sum(task.teacher(p, rng).split(",")[-1] != task.answer(p) for p in carrying)
    assert wrong / len(carrying) == pytest.approx(task.FORGETS, abs=0.03)


def test_splits_are_disjoint_and_repeatable() -> None:
    rows = assets.prompt_rows()
    prompts = {name: {row["input"] for row in file} for name, file in rows.items()}
    assert not prompts["eval.jsonl"] & (prompts["train.jsonl"] | prompts["sft.jsonl"])
    assert len(prompts["eval.jsonl"]) == assets.EVAL_PROBLEMS
    assert rows == assets.prompt_rows()


@pytest.mark.parametrize(
    ("response", "status", "expected"),
    [
        ("7+5=12,2+3+1=6,62", Sample.Status.COMPLETED, 1.0),
        ("62", Sample.Status.COMPLETED, 1.0),
        ("7+5=12,2+3=5,52", Sample.Status.COMPLETED, 0.0),
        ("", Sample.Status.COMPLETED, 0.0),
        ("7+5=12,2+3+1=6,62", Sample.Status.TRUNCATED, 0.0),
    ],
)
def test_reward_looks_at_the_result_only(response: str, status: Sample.Status, expected: float) -> None:
    sample = Sample(response=response, label="62", status=status)
    assert asyncio.run(task.reward(Namespace(), sample)) == expected


def test_assets_are_written_whole_and_once(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "demo"
    assets.write_assets(target)
    assert {path.name for path in target.iterdir()} == {"model", "sft.jsonl", "train.jsonl", "eval.jsonl"}
    assert [path.name for path in target.parent.iterdir()] == ["demo"]
    (target / "eval.jsonl").write_text("kept")
    assets.write_assets(target)
    assert (target / "eval.jsonl").read_text() == "kept"


def test_transformers_reads_the_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assets.write_assets(tmp_path / "demo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "demo/model")
    for row in json.loads(json.dumps(assets.prompt_rows()["sft.jsonl"][:50])):
        ids = tokenizer(row["input"] + row["label"])["input_ids"]
        assert len(ids) == len(row["input"] + row["label"])
        assert tokenizer.decode(ids) == row["input"] + row["label"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == assets.EOS
