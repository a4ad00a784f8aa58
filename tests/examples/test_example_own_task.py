"""The example that newcomers copy: its files fit together and its reward grades as its README says."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from hpc.submitting.command_line import read_request
from rltrain.arguments import parse
from rltrain.arguments.flags import to_argv
from rltrain.functions import load_function
from rltrain.sample import Sample

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_task"


@pytest.fixture(autouse=True)
def in_project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize(
    ("response", "expected"), [("Paris", 1), ("Paris.\n", 1), ("It is Paris.", 1 / 3), ("Rome", 0), ("", 0)]
)
def test_reward(response: str, expected: float) -> None:
    reward = load_function("examples.own_task.reward.reward", flag="--custom-rm-path")
    assert asyncio.run(reward(None, Sample(response=response, label="Paris"))) == pytest.approx(expected)


def test_recipe_names_keys_that_every_prompt_has() -> None:
    args = parse(to_argv(read_request([f"@{EXAMPLE / 'recipe.toml'}"]).train))
    rows = [json.loads(line) for line in Path(args.data.prompt_data).read_text().splitlines()]
    assert len(rows) >= args.rollout.rollout_batch_size
    for row in rows:
        assert row[args.data.input_key][-1]["role"] == "user"
        assert isinstance(row[args.data.label_key], str)
    assert load_function(args.functions.custom_rm_path, flag="--custom-rm-path")


def test_readme_shows_the_files_as_they_are() -> None:
    readme = (EXAMPLE / "README.md").read_text()
    row = re.search(r"```json\n(.*)\n```", readme)
    assert row is not None
    assert row[1] in (EXAMPLE / "prompts.jsonl").read_text().splitlines()
    body = re.search(r"```python\nasync def reward\(args, sample\):\n(.*?)```", readme, re.DOTALL)
    assert body is not None
    assert body[1] in (EXAMPLE / "reward.py").read_text()
