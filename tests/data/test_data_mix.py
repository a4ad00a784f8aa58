"""Parquet prompts, and several files with weights: what comes how often, and that a restart changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltrain.arguments import UserError, parse
from rltrain.data.prompt_file import Prompt, PromptFile, check_prompt_file
from rltrain.data.source import Epochs, RolloutDataSource

ROWS = [
    {
        "input": [{"role": "user", "content": f"{i}+1="}],
        "label": i + 1,
        "metadata": {"number": i},
        "tools": [{"type": "function", "name": "f"}],
        "unused": "x" * 100,
    }
    for i in range(2500)
]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=700)
    return path


@pytest.mark.parametrize("window", ["", "@[:3]", "@[998:1003]", "@[-2:]", "@[2400:9999]", "@[:-2498]"])
def test_parquet_reads_as_the_same_rows_in_jsonl_do(parquet: Path, tmp_path: Path, window: str) -> None:
    jsonl = tmp_path / "p.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ours, theirs = (list(PromptFile(f"{file}{window}", "input", "label")) for file in (parquet, jsonl))
    assert ours == theirs
    assert ours[0].label == ours[0].metadata["number"] + 1
    assert check_prompt_file(f"{parquet}{window}", "input", "label") == len(theirs)


def test_metadata_in_parquet_may_be_json(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"input": ["a", "b"], "metadata": ['{"x": 1}', None]}), path)
    assert list(PromptFile(str(path), "input")) == [Prompt("a", None, {"x": 1}), Prompt("b")]


def test_what_is_wrong_with_a_parquet_file_is_said(parquet: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 0: no key 'question'.*--input-key"):
        list(PromptFile(str(parquet), "question"))
    with pytest.raises(UserError, match="no prompts in that slice"):
        list(PromptFile(f"{parquet}@[5000:]", "input"))
    (tmp_path / "bad.parquet").write_text("no Parquet")
    with pytest.raises(UserError, match="not a Parquet file"):
        list(PromptFile(str(tmp_path / "bad.parquet"), "input"))


FILES = st.lists(
    st.tuples(st.integers(1, 30), st.sampled_from([0.1, 0.5, 1.0, 1.5, 3.0])), min_size=1, max_size=4
)


@given(FILES, st.integers(0, 3), st.booleans())
def test_every_file_has_its_share_and_every_prompt_its_turn(
    files: list[tuple[int, float]], seed: int, shuffle: bool
) -> None:
    sizes, weights = zip(*files, strict=True)
    epochs = Epochs(sizes, weights, seed, shuffle)
    counts: Counter[int] = Counter()
    for epoch in range(10):
        order = epochs.order(epoch)
        assert len(order) == len(epochs)
        counts.update(order)
    first = 0
    for size, weight in files:
        own = [counts[first + i] for i in range(size)]
        assert sum(own) == 10 * max(1, round(size * weight))
        assert max(own) - min(own) <= 1  # equally often, as far as the numbers allow
        first += size


def test_one_file_without_shuffling_comes_in_its_order() -> None:
    assert list(Epochs((5,), (1.0,)).order(3)) == [0, 1, 2, 3, 4]


def test_a_mix_goes_on_after_a_restart_as_if_nothing_had_been(
    make_args: Any, prompt_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"input": ["7+1=", "8+1="], "label": ["8", "9"]}), other)
    config = make_args().replace(prompt_data=None, prompt_data_mix=[str(prompt_file), "0.5", str(other), "3"])
    source = RolloutDataSource(config.namespace)
    assert len(source) == 16

    def prompts(source: RolloutDataSource, count: int) -> list[str]:
        return [group[0].prompt for group in source.get_samples(count)]

    assert Counter(prompts(source, 16))["7+1="] == 3
    source.save(0)
    expected = prompts(source, 20)
    restarted = RolloutDataSource(config.namespace)
    restarted.load(0)
    assert prompts(restarted, 20) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt-data-mix", "a.jsonl"], "pairs"),
        (["--prompt-data-mix", "a.jsonl", "0"], "greater than 0"),
        (["--prompt-data-mix", "a.jsonl", "b.jsonl"], "'b.jsonl' is not a number"),
        (["--prompt-data-mix", "a.jsonl", "1", "--prompt-data", "b"], "give one of them"),
        ([], "--prompt-data"),
    ],
)
def test_mixes_that_make_no_sense_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(["--hf-checkpoint", "m", "--rollout-batch-size", "1", "--num-rollout", "1", *flags])
