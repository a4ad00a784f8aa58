"""analysis.demo_data: the same arguments write the same bytes, and the runs hold what they promise."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from analysis import demo_data, load_run
from analysis.reading.samples import ALL


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_the_same_arguments_write_the_same_bytes(recorded_runs: Path, tmp_path: Path) -> None:
    demo_data.write_demo(tmp_path / "again", steps=12)
    assert digest(tmp_path / "again") == digest(recorded_runs)
    demo_data.write_demo(tmp_path / "other", steps=12, seed=1)
    assert digest(tmp_path / "other") != digest(recorded_runs)


def test_the_runs_hold_what_they_promise(recorded_runs: Path) -> None:
    baseline = load_run(recorded_runs / "baseline")
    assert set(baseline.steps["attempt"]) == {0, 1}
    assert "preempted" in set(baseline.events["reason"].dropna())
    samples = baseline.read_samples("all")
    assert list(samples.columns) == ALL
    assert {"completed", "failed", "truncated"} >= set(samples["status"]) >= {"completed", "failed"}
    assert any(0 < sum(mask) < len(mask) for mask in samples["loss_mask"])  # a tool spoke
    assert all(len(row.trainer_log_probs) == row.response_length for row in samples.itertuples())
    assert list(load_run(recorded_runs / "crashed").events["state"].dropna()) == ["failed"]
    assert "truncated" in set(load_run(recorded_runs / "hacked").samples["status"])


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shortest = [run for run in demo_data.demo_runs(8) if run.name == "crashed"]
    monkeypatch.setattr(demo_data, "demo_runs", lambda steps=24: shortest)
    assert demo_data.main([str(tmp_path), "--steps", "8"]) == 0
    assert str(tmp_path / "crashed") in capsys.readouterr().out
    assert demo_data.main([str(tmp_path)]) == 2
    assert "already holds crashed" in capsys.readouterr().err
