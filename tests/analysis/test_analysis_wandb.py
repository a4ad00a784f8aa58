"""load_wandb: files that the real W&B has written, whole, cut off and damaged; and its API."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes.wandb_server import STEPS, fake_wandb_server

from analysis import DamagedFileError, DamagedFileWarning, RunNotFoundError, load_wandb
from rltrain.wandb_file import HISTORY, fields, read_history, read_records, record_kind

# As rltrain.tracking does it. The second attempt repeats steps 140 to 149.
WRITE = """
import sys, wandb
for first, end, offset in [(0, 150, 0.0), (140, 160, 100.0)]:
    run = wandb.init(project="p", id=sys.argv[2], name="näme", resume="allow", dir=sys.argv[1], mode="offline",
                     config={"lr": 1e-3, "nested": {"a": [1, 2]}}, settings=wandb.Settings(console="off", silent=True))
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    for step in range(first, end):
        row = {"step": step, "train/loss": step / 7 + offset, "nan": float("nan"), "note": "é" * step}
        run.log(row if step % 2 else {**row, "eval/sums": -step})
    run.finish()
"""


def first_header_after(content: bytes, least: int) -> int:
    """Where a record begins, at byte `least` or later."""
    position = 7
    while position < least:
        left = 32768 - position % 32768
        position += left if left < 7 else 7 + int.from_bytes(content[position + 4 : position + 6], "little")
    return position


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the W&B files of two attempts of one run."""
    directory = tmp_path_factory.mktemp("wandb")
    subprocess.run(
        [sys.executable, "-c", WRITE, directory, "abc"], check=True, capture_output=True, timeout=120
    )
    return directory


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_attempts_are_put_together(offline: Path) -> None:
    run = load_wandb(offline, strict=True)
    assert run.name == "näme"
    assert run.config["train"] == {"lr": 1e-3, "nested": {"a": [1, 2]}}
    steps = run.steps.set_index("step")
    assert list(steps.index) == list(range(160))
    expected = [step / 7 + (100 if step >= 140 else 0) for step in range(160)]
    assert steps["train/loss"].tolist() == expected
    assert steps["attempt"].tolist() == [0] * 140 + [1] * 20
    assert steps["eval/sums"].dropna().tolist() == [-step for step in range(0, 160, 2)]
    assert steps["nan"].isna().all()
    assert steps["note"].str.len().tolist() == list(range(160))  # longer than one length byte can tell
    assert len(run.read_steps(every_attempt=True)) == 170
    assert steps["time"].is_monotonic_increasing
    for frame in (run.events, run.samples, run.evals, run.groups, run.attempts):
        assert len(frame) == 0


@pytest.mark.slow
def test_a_file_that_is_cut_off_anywhere_gives_its_beginning(offline: Path, tmp_path: Path) -> None:
    path = files(offline)[0]
    whole = path.read_bytes()
    rng = random.Random(0)
    rows = []
    for size in sorted(rng.sample(range(len(whole)), 40)):
        (tmp_path / "run-abc.wandb").write_bytes(whole[:size])
        rows.append(len(load_wandb(tmp_path / "run-abc.wandb", strict=True).steps) if size > 7 else 0)
    assert rows == sorted(rows)
    assert 0 < rows[20] < rows[-1] <= 150


@pytest.mark.slow
def test_space_reserved_at_the_end_is_no_damage(offline: Path, tmp_path: Path) -> None:
    shutil.copy(files(offline)[0], tmp_path / "run-abc.wandb")
    with (tmp_path / "run-abc.wandb").open("ab") as file:
        file.write(bytes(5000))
    assert len(load_wandb(tmp_path, strict=True).steps) == 150


@pytest.mark.slow
@pytest.mark.parametrize("byte", range(8), ids=["crc"] * 4 + ["length"] * 2 + ["kind", "body"])
def test_a_damaged_file_is_named(offline: Path, tmp_path: Path, byte: int) -> None:
    content = bytearray(files(offline)[0].read_bytes())
    content[first_header_after(content, 10_000) + byte] ^= 0xFF
    path = tmp_path / "run-abc.wandb"
    path.write_bytes(content)
    with pytest.warns(DamagedFileWarning, match=r"run-abc\.wandb is damaged.*(checksum|longer)"):
        assert 0 < len(load_wandb(path).steps) < 150
    with pytest.raises(DamagedFileError, match=r"run-abc\.wandb is damaged"):
        load_wandb(path, strict=True)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run-abc.wandb"
    path.write_text("something else")
    with pytest.raises(DamagedFileError, match="does not begin"):
        load_wandb(path, strict=True)


@pytest.mark.slow
def test_the_records_are_those_of_wandbs_own_parser(offline: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    for path in files(offline):
        records = read_records(path, pytest.fail)
        own = [wandb_internal_pb2.Record.FromString(record) for record in records]
        kinds = [
            wandb_internal_pb2.Record.DESCRIPTOR.fields_by_name[r.WhichOneof("record_type")].number
            for r in own
        ]
        assert [record_kind(record) for record in records] == kinds
        history = [record for record in records if record_kind(record) == HISTORY]
        columns = read_history(history)
        parsed = [r.history for r in own if r.HasField("history")]
        for i, row in enumerate(parsed):
            expected = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item
            }
            found = {key: values[i] for key, values in columns.items() if key in expected}
            np.testing.assert_equal(found, expected)


def test_fields_reads_what_protobuf_writes() -> None:
    from wandb.proto import wandb_internal_pb2

    item = wandb_internal_pb2.HistoryItem(nested_key=["a", "b"], value_json="[1, 300]")
    assert list(fields(item.SerializeToString())) == [(2, b"a"), (2, b"b"), (16, b"[1, 300]")]
    record = wandb_internal_pb2.Record(num=130, history={"item": [item], "step": {"num": 130}})
    assert read_history([record.SerializeToString()]) == {"a.b": [[1, 300]]}
    if "number" not in wandb_internal_pb2.HistoryItem.DESCRIPTOR.fields_by_name:
        return
    # From 0.31 on, numbers are written as they are, not as JSON.
    typed = wandb_internal_pb2.HistoryItem(key="x", number=0.5)
    record = wandb_internal_pb2.Record(num=1, history={"item": [typed, item]})
    assert read_history([record.SerializeToString()] * 3) == {"x": [0.5] * 3, "a.b": [[1, 300]] * 3}


@pytest.mark.slow
def test_several_runs_ask_which(offline: Path, tmp_path: Path) -> None:
    shutil.copytree(offline, tmp_path / "w", symlinks=True)
    one = files(tmp_path / "w")[0]
    other = one.parent.with_name("offline-run-20200101_000000-xyz")
    other.mkdir()
    shutil.copy(one, other / "run-xyz.wandb")
    with pytest.raises(RunNotFoundError, match="run_id= abc, xyz"):
        load_wandb(tmp_path / "w")
    assert len(load_wandb(tmp_path / "w", run_id="xyz").steps) == 150
    with pytest.raises(RunNotFoundError, match="no W&B file of run no"):
        load_wandb(tmp_path / "w", run_id="no")
    with pytest.raises(RunNotFoundError, match="entity/project/run"):
        load_wandb(tmp_path / "nothing")


# In a process of its own, because W&B keeps its settings and its service for the life of one.
ONLINE = """
import json
from analysis import RunNotFoundError, Runs, load_wandb
run = load_wandb("team/project/abc")
print(json.dumps([run.name, json.loads(run.steps.to_json(orient="split", date_format="iso"))]))
print(Runs([run]).runs.to_json(orient="records", date_format="iso"))
print(json.dumps([len(frame) for frame in (run.samples, run.evals, run.groups, run.events, run.attempts)]))
try:
    load_wandb("team/project/other")
except RunNotFoundError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_online_runs_come_through_the_public_api(tmp_path: Path) -> None:
    """The real `wandb.Api`, and a server that answers what it asks."""
    with fake_wandb_server() as url:
        env = {**os.environ, "WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "HOME": str(tmp_path),
               "WANDB_DIR": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path)}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", ONLINE], env=env, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    (name, split), [row], lengths, missing = map(json.loads, done.stdout.splitlines())
    steps = dict(zip(split["columns"], zip(*split["data"], strict=True), strict=True))
    assert name == "nice"
    assert steps["step"] == tuple(range(STEPS))
    assert steps["train/loss"] == tuple(step / 4 for step in range(STEPS))
    assert steps["eval/sums"] == (None,) * (STEPS - 1) + (1.0,)
    assert steps["attempt"] == (0,) * STEPS
    assert (row["state"], row["config.lr"], row["config.nested.a"]) == ("finished", 0.1, 1)
    assert row["wandb_url"] == f"{url}/team/project/runs/abc"
    assert lengths == [0] * 5
    assert "team/project/other" in missing
