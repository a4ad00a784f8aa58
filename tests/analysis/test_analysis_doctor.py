"""run.doctor() and its command, against runs with known faults."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.recorded_runs import steps_run

from analysis import Runs, doctor, load_run, load_runs, metrics, plots
from rltrain.run.files import append_event
from rltrain.run.layout import RunLayout


@pytest.fixture(scope="module")
def runs(recorded_runs: Path) -> Runs:
    return load_runs(recorded_runs)


@pytest.mark.slow
def test_the_doctor_finds_what_was_put_in(runs: Runs) -> None:
    found = {run.name: {finding.name for finding in run.doctor()} for run in runs}
    assert {"kl-spike-after-resume", "lost-steps"} <= found["baseline"]
    assert {"mismatch-drift", "reward-hacking", "entropy-collapse", "truncation"} <= found["hacked"]
    assert "failed-run" in found["crashed"]
    serious = {"mismatch-drift", "reward-hacking", "entropy-collapse", "kl-spike-after-resume", "truncation"}
    assert not serious & found["fast"]
    for run in runs:
        for finding in run.doctor():
            assert callable(getattr(plots, finding.plot))


def test_rarer_findings(tmp_path: Path) -> None:
    rows = [
        {"step": i, "train/loss": 0.1, "train/lr": 1, "rollout/zero_std_ratio": 0.9, "rollout/reward": 0.0,
         "perf/step_s": 10, "perf/generate_s": 9}
        for i in range(12)
    ]  # fmt: skip
    rows[7]["train/loss"] = float("nan")
    config = "[train]\ncolocate = false\n"
    found = {f.name: f for f in load_run(steps_run(tmp_path / "run", rows, config)).doctor()}
    assert set(found) == {"not-finite", "zero-std-groups", "idle-roles"}
    assert "step 7" in found["not-finite"].evidence
    assert "easier or harder" in found["zero-std-groups"].advice  # nothing tells which
    assert "trainer GPUs wait" in found["idle-roles"].evidence
    assert len(load_run(steps_run(tmp_path / "empty", [])).doctor()) == 0
    layout = steps_run(tmp_path / "full", [])
    for kind, reason in [("checkpoint_saved", None), ("checkpoint_failed", "the disk is full")]:
        append_event(layout / "events.jsonl", 0, kind, {"step": 1, "reason": reason})
    [finding] = load_run(layout).doctor()
    assert finding.name == "checkpoints-lost" and "the disk is full" in finding.evidence


def test_findings_of_samples_that_are_old_or_failed(runs: Runs, tmp_path: Path) -> None:
    """Versions change within a sample, as they do when engines get new weights while they generate."""
    layout = RunLayout(tmp_path / "run")
    source = RunLayout(Path(runs["fast"].path))
    for step in range(6, 12):
        table = pq.read_table(source.step_dir(step, 0) / "part-0.parquet", partitioning=None)
        columns = {"weight_versions": [[str(step - 3), str(step - 2)]] * len(table),
                   "failure": ["ValueError: no number\nTraceback (most recent call last):\n  File x\n"] * len(table),
                   "status": ["failed"] * len(table)}  # fmt: skip
        for name, values in columns.items():
            at = table.schema.get_field_index(name)
            table = table.set_column(at, name, pa.array(values, table.schema.field(name).type))
        layout.step_dir(step, 0).mkdir(parents=True)
        pq.write_table(table, layout.step_dir(step, 0) / "part-0.parquet")
    run = load_run(layout.root)
    assert metrics.staleness(run).values.tolist() == [[2.5, 3, 1]] * 6
    found = {f.name: f for f in run.doctor()}
    assert set(found) == {"stale-weights", "failed-samples"}
    assert "2.5 updates before" in found["stale-weights"].evidence
    assert found["failed-samples"].evidence == "288 of 288 samples failed, mostly: ValueError: no number"


def test_mismatch_is_shown_token_by_token(runs: Runs) -> None:
    run = runs["hacked"]
    [finding] = [finding for finding in run.doctor() if finding.name == "mismatch-drift"]
    last = metrics.token_quantiles(run, 11).loc[11]
    assert f"in step 11 one token in fifty has a ratio below {last['ratio_q01']:.3g}" in finding.evidence
    assert finding.plot == "token_gap"


def test_doctor_command_line(recorded_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([str(recorded_runs / "baseline")]) == 1  # an error
    assert "kl-spike-after-resume" in capsys.readouterr().out
    assert doctor.main([str(recorded_runs / "hacked")]) == 0
    assert doctor.main([str(recorded_runs / "hacked"), "--fail-on", "warning", "--json"]) == 1
    printed = capsys.readouterr().out
    findings = json.loads(printed[printed.index("[\n") :])
    assert {"name", "severity", "evidence", "plot", "advice", "samples"} == set(findings[0])
    assert doctor.main([str(recorded_runs / "baseline"), "--fail-on", "never"]) == 0
    assert doctor.main([str(recorded_runs / "nothing")]) == 2
