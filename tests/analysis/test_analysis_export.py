"""analysis.export: every frame as JSON lines and as Parquet that others can read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

import analysis
from analysis import export, load_runs, trace


# It has no agents, and nobody has noted anything.
@pytest.mark.parametrize("frame", [name for name in export.FRAMES if name not in ("sessions", "notes")])
def test_every_frame(
    frame: str, recorded_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = getattr(load_runs(recorded_runs), frame)
    assert export.main([str(recorded_runs), "--frame", frame, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(expected) > 0
    assert list(rows[0]) == list(expected)
    assert (
        export.main([str(recorded_runs), "--frame", frame, "--parquet", str(tmp_path / "frame.parquet")]) == 0
    )
    table = pq.read_table(tmp_path / "frame.parquet")
    assert table.column_names == list(expected)
    assert len(table) == len(expected)


def test_no_such_run(tmp_path: Path) -> None:
    assert export.main([str(tmp_path / "nothing"), "--json"]) == 2


def test_csv(recorded_runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "steps.csv"
    assert export.main([str(recorded_runs / "fast"), "--frame", "steps", "--csv", str(file)]) == 0
    frame, expected = pd.read_csv(file), load_runs(recorded_runs / "fast").steps
    assert frame["rollout/reward"].tolist() == expected["rollout/reward"].tolist()
    assert pd.to_datetime(frame["time"]).tolist() == expected["time"].tolist()


def test_the_commands_are_listed_and_importing_is_light() -> None:
    heavy = "torch sglang megatron transformers matplotlib wandb submitit"
    code = "import runpy, sys; runpy.run_module('analysis', run_name='__main__')\n"
    code += f"print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed, _, imported = done.stdout.rstrip().rpartition("\n")
    assert imported == "[]"
    with_main = [
        path.stem
        for path in Path(analysis.__file__).parent.glob("[a-z]*.py")
        if "__main__" in path.read_text()
    ]
    for name in with_main:
        assert f"  {name} " in listed


def test_a_trace_has_every_phase_and_sample_in_its_step(recorded_runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    assert trace.main([str(recorded_runs / "fast"), "-o", str(file), "--steps", "2", "3"]) == 0
    events = [each for each in json.loads(file.read_text())["traceEvents"] if each["ph"] == "X"]
    run = load_runs(recorded_runs / "fast")[0]
    phases = {"step 2", "step 3", "rollout", "train", "update_weights"}
    assert {each["name"] for each in events if each["pid"] == 1} >= phases
    steps = {each["args"]["step"]: each for each in events if each["name"] in ("step 2", "step 3")}
    assert steps[2]["ts"] == 0 and steps[3]["ts"] >= steps[2]["dur"] - 1e4
    samples = [each for each in events if each["name"].startswith("sample ")]
    assert len(samples) == len(run.samples[run.samples["step"].isin([2, 3])])
    for each in samples:
        step = steps[each["args"]["step"]]
        assert step["ts"] <= each["ts"] <= step["ts"] + step["dur"]
    assert trace.main([str(recorded_runs / "fast"), "--steps", "99"]) == 2
