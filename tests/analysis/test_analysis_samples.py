"""Samples of a run: which files, which columns, damaged files; and the progress bar while they are read."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.synthetic_run import GROUP_SIZE, GROUPS, HOSTILE, write_run

from analysis import DamagedFileError, DamagedFileWarning, load_run
from analysis.reading import progress
from analysis.reading.samples import ALL, SCALARS, TEXT, TOKENS
from rltrain.run.layout import RunLayout
from rltrain.schema import SCHEMA, TRAINER_SCHEMA

STEP_SAMPLES = GROUPS * GROUP_SIZE
README = Path(__file__).parents[2] / "analysis" / "README.md"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", steps=12)


@pytest.fixture
def copy(layout: RunLayout, tmp_path: Path) -> RunLayout:
    """The same run, to be damaged."""
    shutil.copytree(layout.root, tmp_path / "copy")
    return RunLayout(tmp_path / "copy")


def test_samples_are_scalars_of_the_newest_attempt(layout: RunLayout) -> None:
    samples = load_run(layout.root).samples
    assert list(samples.columns) == SCALARS
    assert len(samples) == 12 * STEP_SAMPLES
    assert samples["index"].is_unique
    assert list(samples.groupby("step")["attempt"].first()) == [0] * 6 + [1] * 6
    raw = pq.read_table(layout.step_dir(7, 1) / "part-0.parquet")
    assert list(samples.loc[samples["step"] == 7, "reward"]) == raw["reward"].to_pylist()


def test_every_column_is_in_exactly_one_set_and_documented() -> None:
    assert sorted([*SCALARS, *TEXT, *TOKENS]) == sorted({*SCHEMA.names, *TRAINER_SCHEMA.names})
    text = README.read_text()
    for name in ALL:
        assert f"`{name}`" in text, f"{README.name} does not explain the column {name}"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("text", SCALARS + TEXT),
        ("tokens", SCALARS + TOKENS),
        ("all", ALL),
        (["response", "step"], ["step", "attempt", "dataset", "group_index", "index", "response"]),
    ],
)
def test_columns(layout: RunLayout, columns: str | list[str], expected: list[str]) -> None:
    assert list(load_run(layout.root).read_samples(columns, steps=2).columns) == expected


def test_tokens_fit_together(layout: RunLayout) -> None:
    for _, row in load_run(layout.root).read_samples("tokens", steps=[2, 3]).iterrows():
        assert len(row["tokens"]) == row["prompt_length"] + row["response_length"]
        assert len(row["loss_mask"]) == len(row["rollout_log_probs"]) == row["response_length"]
        assert list(row["weight_versions"]) == [str(row["step"])]


def test_texts_come_as_they_were_written(layout: RunLayout) -> None:
    texts = load_run(layout.root).read_samples("text", steps=2)
    assert texts["response"].iloc[0].endswith(HOSTILE)
    assert json.loads(texts["prompt"].iloc[0])[0]["role"] == "user"


def test_unknown_columns_and_steps_are_named(layout: RunLayout) -> None:
    run = load_run(layout.root)
    with pytest.raises(ValueError, match='unknown columns "txt": choose from scalars, text, tokens, all'):
        run.read_samples("txt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no column rewrd; they have step,.*reward"):
        run.read_samples(["rewrd"])
    with pytest.raises(ValueError, match="no samples of step 12, 99: steps 0 to 11 have"):
        run.read_samples(steps=[3, 99, 12])


def test_evals_count_the_steps_trained_before_them(layout: RunLayout) -> None:
    run = load_run(layout.root)
    means = run.evals.groupby("step")["reward"].mean()
    # The metrics of the evaluation after step k stand on the line of step k; -1 is before training.
    recorded = run.steps.set_index("step")["eval/sums"].dropna()
    assert list(means.index) == [0, 5, 10] == list(recorded.index + 1)
    assert list(means) == pytest.approx(list(recorded))
    assert set(run.evals["dataset"]) == {"sums"}
    assert "tokens" in run.read_evals("tokens")


def test_some_samples_of_some_steps(layout: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are those of the whole step, and the directories of other steps are not even looked into."""
    run, looked, really_list = load_run(layout.root), [], os.listdir

    def listdir(path: Path) -> list[str]:
        looked.append(str(path))
        return really_list(path)

    for dataset, steps in (("train", [2, 7]), ("sums", [5])):
        whole = run.read_set(dataset, steps)
        chosen = whole["index"].iloc[[1, 4, len(whole) - 1]].tolist()
        looked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", listdir)
            found = run.read_set(dataset, steps, indices=chosen)
        pd.testing.assert_frame_equal(found, whole[whole["index"].isin(chosen)].reset_index(drop=True))
        assert {int(step) for path in looked for step in re.findall(r"step=(\d+)", path)} == set(steps)


def test_a_file_that_is_being_written_is_ignored(copy: RunLayout) -> None:
    attempt = copy.step_dir(11, 2)
    attempt.mkdir(parents=True)
    (attempt / ".part-0.parquet").write_bytes(b"PAR1 half")
    samples = load_run(copy.root, strict=True).samples
    assert set(samples.loc[samples["step"] == 11, "attempt"]) == {1}


def test_a_damaged_file_is_named_and_the_others_are_read(copy: RunLayout) -> None:
    path = copy.step_dir(3, 0) / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(DamagedFileWarning, match=r"step=000003/attempt=0/part-0\.parquet is damaged"):
        samples = load_run(copy.root).samples
    assert len(samples) == 11 * STEP_SAMPLES
    assert 3 not in set(samples["step"])
    with pytest.raises(DamagedFileError, match=r"step=000003/attempt=0/part-0\.parquet is damaged"):
        _ = load_run(copy.root, strict=True).samples


def test_files_of_older_and_newer_versions_are_read(copy: RunLayout) -> None:
    path = copy.step_dir(0, 0) / "part-0.parquet"
    table = pq.read_table(path)
    older = table.drop_columns(["reward_seconds"])
    pq.write_table(older.append_column("new_column", pa.nulls(len(table), pa.int8())), path)
    samples = load_run(copy.root, strict=True).samples
    assert samples.loc[samples["step"] == 0, "reward_seconds"].isna().all()
    assert samples.loc[samples["step"] > 0, "reward_seconds"].notna().all()
    assert "new_column" not in samples


def test_several_parts_of_a_step_are_read_in_order(copy: RunLayout) -> None:
    path = copy.step_dir(4, 0) / "part-0.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 5), path)
    pq.write_table(table.slice(5), path.with_name("part-1.parquet"))
    samples = load_run(copy.root, strict=True).read_samples(steps=4)
    assert list(samples["index"]) == table["index"].to_pylist()


@pytest.mark.parametrize(
    ("patience", "is_tty", "shown"), [(-1.0, True, True), (-1.0, False, False), (600.0, True, False)]
)
def test_a_bar_only_where_it_is_slow_and_seen(
    patience: float,
    is_tty: bool,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", patience)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_tty)
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.progress([1, 2, 3], "reading runs")) == [1, 2, 3]
    assert ("reading runs" in capsys.readouterr().err) == shown
