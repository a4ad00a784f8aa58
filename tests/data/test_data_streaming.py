"""Prompt files that are larger than memory: what is held is small, any row can be read, and the order is exact."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rltrain.data.prompt_file import PromptFile, check_prompt_file
from rltrain.data.source import Epochs, RolloutDataSource
from rltrain.run.errors import UserError

ROWS, ROW_BYTES = 1500, 20_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same 30 MB of prompts in both formats."""
    directory = tmp_path_factory.mktemp("large")
    rng = random.Random(0)
    rows = [
        {"input": f"{i}+{i}=", "label": str(2 * i), "metadata": {"text": rng.randbytes(ROW_BYTES // 2).hex()}}
        for i in range(ROWS)
    ]
    jsonl, parquet = directory / "p.jsonl", directory / "p.parquet"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), parquet, row_group_size=100)
    return {"jsonl": str(jsonl), "parquet": str(parquet)}


def peak_megabytes(work: Callable[[], object]) -> float:
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    try:
        work()
        return (tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before) / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(large: dict[str, str], make_args: Any, kind: str) -> None:
    RolloutDataSource(make_args().namespace)  # so that imports are not counted
    config = make_args("--prompt-data", large[kind], "--rollout-shuffle", "--rollout-max-prompt-len", "12")

    def work() -> None:
        if kind == "jsonl":
            assert check_prompt_file(large[kind], "input", "label") == ROWS
        source = RolloutDataSource(config.namespace)
        assert len(source) == ROWS
        for _ in range(50):
            source.get_samples(4)

    # 128 rows of 20 kB are tokenised at a time; of Parquet, a group of 100 rows is also held as it is read.
    assert ROWS * ROW_BYTES == 30e6
    assert peak_megabytes(work) < 15


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_can_be_read_in_any_order(large: dict[str, str], kind: str) -> None:
    whole, part = (
        PromptFile(large[kind], "input", "label"),
        PromptFile(f"{large[kind]}@[1100:1200]", "input", "label"),
    )
    assert (len(whole), len(part)) == (ROWS, 100)
    for i in (1499, 0, 777, 1000, 999):
        assert (whole[i].prompt, whole[i].label) == (f"{i}+{i}=", str(2 * i))
    assert [part[i].label for i in (99, 0)] == ["2398", "2200"]
    assert [prompt.label for prompt in part] == [str(2 * i) for i in range(1100, 1200)]


def test_blank_lines_and_windows_do_not_shift_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"input": "a"}\r\n\n  \n{"input": "é"}\n{"input": 3}\n\n')
    file = PromptFile(str(path), "input")
    assert len(file) == 3 and [file[i].prompt for i in (1, 0)] == ["é", "a"]
    with pytest.raises(UserError, match=r"p.jsonl:6: 'input' holds a int"):
        file[2]
    assert [each.prompt for each in PromptFile(f"{path}@[1:2]", "input")] == ["é"]
    assert [each.prompt for each in PromptFile(f"{path}@[:-1]", "input")] == ["a", "é"]


@pytest.mark.slow
def test_a_shuffled_epoch_goes_on_exactly_where_it_stopped(large: dict[str, str], make_args: Any) -> None:
    config = make_args("--prompt-data", large["jsonl"], "--rollout-shuffle", "--rollout-seed", "7")
    unbroken, first = RolloutDataSource(config.namespace), RolloutDataSource(config.namespace)
    labels = [group[0].label for _ in range(500) for group in unbroken.get_samples(4)]
    for _ in range(200):
        first.get_samples(4)
    first.save(199)
    second = RolloutDataSource(config.namespace)
    second.load(199)
    assert [group[0].label for _ in range(300) for group in second.get_samples(4)] == labels[800:]
    assert sorted(labels[:ROWS]) == sorted(str(2 * i) for i in range(ROWS)) and labels[:ROWS] != labels[ROWS:]


def test_the_order_of_an_epoch_is_that_of_a_shuffled_list_and_takes_8_bytes_a_prompt() -> None:
    epochs = Epochs((20_000,), (1.0,), seed=3, shuffle=True)
    expected = list(range(20_000))
    random.Random("3/5").shuffle(expected)
    assert list(epochs.order(5)) == expected
    assert peak_megabytes(lambda: epochs.order(6)) < 0.24


def test_what_a_subclass_keeps_is_stored_with_the_state(make_args: Any) -> None:
    source = RolloutDataSource(make_args().namespace)
    source.metadata["level"] = 3
    source.save(0)
    again = RolloutDataSource(make_args().namespace)
    again.load(0)
    assert again.metadata == {"level": 3}
    again.load(-1)
    assert again.metadata == {}
