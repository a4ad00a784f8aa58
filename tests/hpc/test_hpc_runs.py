"""What a run's files say about it."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from helpers.run_files import make_run, submitted_to_slurm

from hpc.runs.find import choose_runs, find_run, find_runs, read_run, read_submissions
from hpc.runs.lock import hold_lock
from rltrain.run.errors import UserError
from rltrain.run.files import append_event
from rltrain.run.finished import Finish, is_finished, write_finish


def test_runs_are_found_the_last_changed_at_the_end(tmp_path: Path) -> None:
    for age, name in [(10, "b"), (30, "c"), (20, "a")]:
        layout = make_run(tmp_path, name, phase="finished")
        os.utime(layout.status, (1e9 - age, 1e9 - age))
    (tmp_path / "demo-data").mkdir()
    (tmp_path / ".draft").mkdir()
    (tmp_path / ".draft" / "config.toml").touch()
    assert [layout.name for layout in find_runs(tmp_path)] == ["c", "a", "b"]
    assert find_runs(tmp_path / "nowhere") == []


def test_a_run_is_found_by_name_or_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs", "grpo-7b")
    monkeypatch.chdir(tmp_path)
    wanted = tmp_path / "runs" / "grpo-7b"
    for name in ("grpo-7b", "runs/grpo-7b", wanted):
        assert find_run(name).root == wanted
    with pytest.raises(UserError, match="Did you mean grpo-7b"):
        find_run("grpo-70b")
    with pytest.raises(UserError, match="last ones there: grpo-7b"):
        choose_runs(["zzz"], tmp_path / "runs")
    with pytest.raises(UserError, match="--runs-dir"):
        find_run("x", tmp_path / "empty")


@pytest.mark.parametrize(
    ("phase", "attempts", "state"),
    [
        (None, 0, "not submitted"),
        ("starting", 1, "lost"),
        ("training", 2, "lost"),
        ("finished", 1, "stopped"),  # it claims to be, without having done a step
        ("stopped", 1, "stopped"),
        ("failed", 1, "failed"),
    ],
)
def test_state_from_files(tmp_path: Path, phase: str | None, attempts: int, state: str) -> None:
    record = read_run(make_run(tmp_path, "x", phase=phase, attempts=attempts))
    assert (record.state, record.attempts) == (state, attempts)
    if not attempts:
        assert "sbatch has not accepted it" in (record.reason or "")
        assert read_run(submitted_to_slurm(record.layout, "7")).state == "submitted"


def test_finished_is_what_the_trainer_has_proven(tmp_path: Path) -> None:
    layout = make_run(
        tmp_path, "x", phase="finished", steps=6, attempts=1
    )  # of 10: Slurm gave up on the trainer
    record = read_run(layout)
    assert record.state == "stopped" and "only 6 steps" in (record.reason or "")
    write_finish(layout, Finish(steps=10, attempt=0, checkpoint=10))
    assert read_run(layout).state == "finished"
    layout.status.write_text('{"phase": "evaluating"}')  # the supervisor was killed before it had noticed
    assert read_run(layout).state == "finished"
    layout.config.write_text("[flags]\n[train]\nnum_rollout = 20\n")  # more are wanted now
    assert read_run(layout).state == "lost" and not is_finished(layout, 20) and is_finished(layout, 10)


def test_a_run_of_an_older_version_is_judged_by_its_metrics(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path, "x", phase="finished", steps=10, attempts=1)).state == "finished"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    layout = make_run(tmp_path, "x", phase="training", attempts=1)
    (layout.log_dir(0) / "rollout-0.log").write_text("OSError: [Errno 28] No space left on device: 'x'\n")
    assert read_run(layout).reason == "the disk was full: see rollout-0.log"


def test_progress_and_reason(tmp_path: Path) -> None:
    layout = make_run(tmp_path, "x", phase="failed", steps=4, attempts=1)
    append_event(
        layout.events,
        0,
        "attempt_finished",
        {"state": "failed", "reason": "engine-1 died. Its log, /x.log, ends:\n | log"},
    )
    with layout.metrics.open("a") as file:
        file.write('{"step": 4, "rollo')  # being written
    record = read_run(layout)
    assert (record.step, record.num_rollout, record.reward) == (4, 10, 0.3)
    assert record.reason == "engine-1 died"


def test_progress_of_a_long_run_and_of_one_that_went_back(tmp_path: Path) -> None:
    layout = make_run(tmp_path, "x", steps=5000)
    assert layout.metrics.stat().st_size > 2 * 64 * 1024
    assert read_run(layout).step == 5000
    with layout.metrics.open("a") as file:
        file.write('{"step": 41}\n')  # resumed from an earlier checkpoint
    assert read_run(layout).step == 42


def test_holder_is_seen_while_it_holds(tmp_path: Path) -> None:
    layout = make_run(tmp_path, "x", phase="training", attempts=1)
    with hold_lock(layout):
        record = read_run(layout)
        assert record.holder and record.holder.pid == os.getpid() and record.holder.is_here
        assert record.state == "running"
        layout.lock.write_text("")  # the moment before it is written
        assert read_run(layout).state == "running"
    assert read_run(layout).holder is None


def test_submissions(tmp_path: Path) -> None:
    layout = make_run(tmp_path, "x")
    assert read_submissions(layout) == ()
    entry = {
        "job_id": 28,
        "components": ["28+0", "28+1"],
        "cluster": None,
        "layout": "het",
        "partition": ["low"],
    }
    layout.job.write_text(json.dumps([{**entry, "submitted": "2026-11-22T11:28:17+00:00"}, {"job_id": "x"}]))
    record = read_run(layout)
    first, second = record.submissions
    assert (first.job_id, first.components, first.layout) == ("28", ("28+0", "28+1"), "het")
    assert first.submitted == datetime(2026, 11, 22, 11, 28, 17, tzinfo=UTC)
    assert record.slurm_jobs == [first] and record.was_last_local and second.submitted is None
    layout.job.write_text("[{")
    assert read_submissions(layout) == ()
