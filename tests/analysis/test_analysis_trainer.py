"""What the trainer saw of a step's tokens: which file belongs to which samples, and files of older schemas."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import DamagedFileError, DamagedFileWarning, load_run, metrics
from analysis.reading.samples import SCALARS
from rltrain.run.layout import RunLayout
from rltrain.schema import SCHEMA_VERSION, TRAINER_SCHEMA

LISTS = ["trainer_log_probs", "trainer_entropies", "advantages"]


@pytest.fixture
def layout(recorded_runs: Path, tmp_path: Path) -> RunLayout:
    """A recorded run, to be changed."""
    shutil.copytree(recorded_runs / "fast", tmp_path / "run")
    return RunLayout(tmp_path / "run")


def trainer_table(layout: RunLayout, step: int, attempt: int = 0) -> pa.Table:
    return pq.read_table(layout.trainer_dir(step, attempt) / "part-0.parquet", partitioning=None)


def write(table: pa.Table, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, directory / "part-0.parquet")


def test_every_sample_gets_its_own_lists(layout: RunLayout) -> None:
    table = trainer_table(layout, 3)
    assert (
        table.cast(TRAINER_SCHEMA).schema.metadata == table.schema.metadata
    )  # Parquet renames the lists' items
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))  # as it is after balancing
    write(shuffled, layout.trainer_dir(3, 0))
    recorded = {row["index"]: row for row in table.to_pylist()}
    samples = load_run(layout.root, strict=True).read_samples("tokens", steps=3)
    for row in samples.to_dict("records"):
        for name in LISTS:
            assert list(row[name]) == recorded[row["index"]][name]
    tokens = load_run(layout.root).tokens(samples.iloc[4])
    response = tokens[tokens["part"] == "response"]
    assert list(response["advantage"]) == list(samples["advantages"].iloc[4])
    assert list(response["log_prob_trainer"]) == list(samples["trainer_log_probs"].iloc[4])


def test_the_last_attempt_that_trained_on_it_wins(layout: RunLayout) -> None:
    """A restart takes the samples of the attempt before, and trains on them again."""
    table = trainer_table(layout, 3)
    for attempt, value in [(1, -1.0), (2, -2.0)]:
        lists = pa.array(
            [[value] * len(x) for x in table["trainer_log_probs"].to_pylist()], pa.list_(pa.float32())
        )
        again = table.set_column(1, "attempt", pa.array([attempt] * len(table), pa.int32()))
        write(again.set_column(3, "trainer_log_probs", lists), layout.trainer_dir(3, attempt))
    samples = load_run(layout.root, strict=True).read_samples(["trainer_log_probs"], steps=[2, 3])
    assert list(samples) == ["step", "attempt", "dataset", "group_index", "index", "trainer_log_probs"]
    assert {value for row in samples.query("step == 3")["trainer_log_probs"] for value in row} == {-2.0}
    assert -2.0 not in {value for row in samples.query("step == 2")["trainer_log_probs"] for value in row}


def test_what_was_trained_on_before_the_samples_were_made_anew_is_left_out(layout: RunLayout) -> None:
    table = pq.read_table(layout.step_dir(3, 0) / "part-0.parquet", partitioning=None)
    write(table.set_column(1, "attempt", pa.array([1] * len(table), pa.int32())), layout.step_dir(3, 1))
    assert load_run(layout.root, strict=True).read_samples("tokens", steps=3)[LISTS].isna().all(axis=None)
    # Lists of another length belong to another response.
    shorter = pa.array([[0.0]] * len(table), pa.list_(pa.float32()))
    write(trainer_table(layout, 2).set_column(3, "trainer_log_probs", shorter), layout.trainer_dir(2, 0))
    samples = load_run(layout.root, strict=True).read_samples("tokens", steps=2)
    assert samples["trainer_log_probs"].isna().all()
    assert samples["advantages"].notna().all()


def test_without_trainer_files_the_columns_are_missing(layout: RunLayout) -> None:
    shutil.rmtree(layout.trainer_dir(0, 0).parents[1])
    run = load_run(layout.root, strict=True)
    samples = run.read_samples("all")
    assert samples[LISTS].isna().all(axis=None)
    assert (
        run.tokens(samples.iloc[0])[["log_prob_trainer", "gap", "entropy", "advantage"]].isna().all(axis=None)
    )
    assert metrics.token_quantiles(run).empty
    assert run.read_evals("all")[LISTS].isna().all(axis=None)


def test_a_damaged_trainer_file_is_named(layout: RunLayout) -> None:
    path = layout.trainer_dir(3, 0) / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(
        DamagedFileWarning, match=r"rollouts_trainer/step=000003/attempt=0/part-0\.parquet is damaged"
    ):
        samples = load_run(layout.root).read_samples("tokens", steps=[3, 4])
    assert samples["advantages"].isna().tolist() == (samples["step"] == 3).tolist()
    with pytest.raises(DamagedFileError, match=r"rollouts_trainer/step=000003"):
        load_run(layout.root, strict=True).read_samples("tokens")
    assert len(load_run(layout.root, strict=True).samples)  # who does not ask for it does not open it


@pytest.mark.parametrize("version", ["1", "2"])
def test_samples_of_older_schemas_are_read(layout: RunLayout, version: str) -> None:
    """1 has nothing of the trainer; 2 has it as columns of the samples; both lack what came later."""
    path = layout.step_dir(2, 0) / "part-0.parquet"
    table = pq.read_table(path, partitioning=None).drop_columns(["failure", "reward_seconds"])
    assert table.schema.metadata[b"slurmlime.schema"] == SCHEMA_VERSION.encode()
    trainer = trainer_table(layout, 2)
    if version == "2":
        for name in LISTS[:2]:
            table = table.append_column(name, trainer[name])
    table = table.append_column("not_ours", pa.array([1] * len(table)))
    write(table.replace_schema_metadata({"slurmlime.schema": version}), path.parent)
    shutil.rmtree(layout.trainer_dir(2, 0))
    run = load_run(layout.root, strict=True)
    old = run.read_samples("all", steps=[2, 3]).query("step == 2")
    assert old["failure"].isna().all()
    assert old["advantages"].isna().all()
    assert (old["trainer_log_probs"].isna() == (version == "1")).all()
    gap = run.tokens(old.iloc[0])["gap"].dropna()
    assert len(gap) == (old["response_length"].iloc[0] if version == "2" else 0)
    assert list(run.samples) == SCALARS
