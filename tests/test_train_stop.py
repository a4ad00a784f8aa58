"""A stop does not wait for an unfinished rollout, and saving does not depend on W&B."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc.layout import RunLayout
from rltrain import job as job_module
from rltrain.job import Job
from rltrain.tracking import Tracker


@pytest.fixture
def make_job(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(job_module, "_ASK_SECONDS", 0.05)
    monkeypatch.setattr(job_module, "on_rank_0", lambda call: call())

    def make(generate: object, stop: str | None = None) -> Job:
        job = Job.__new__(Job)
        job._rollout = SimpleNamespace(generate=generate)  # type: ignore[assignment]
        job._registry = SimpleNamespace(stop_requested=lambda: stop)  # type: ignore[assignment]
        return job

    return make


def test_a_finished_rollout_is_taken_even_when_stopping(make_job) -> None:
    assert make_job(lambda i: ("table", {"step": i}), stop="SIGTERM").generate(3) == ("table", {"step": 3})


def test_an_unfinished_one_is_dropped(make_job) -> None:
    never = threading.Event()
    begun = time.monotonic()
    assert make_job(lambda i: never.wait(60), stop="SIGTERM").generate(0) is None
    assert time.monotonic() - begun < 5
    never.set()


def test_without_a_stop_it_is_waited_for(make_job) -> None:
    assert make_job(lambda i: time.sleep(0.3) or "late").generate(0) == "late"


def test_errors_are_passed_on(make_job) -> None:
    def broken(rollout_id: int) -> None:
        raise RuntimeError("no prompts")

    with pytest.raises(RuntimeError, match="no prompts"):
        make_job(broken).generate(0)


def test_metrics_are_kept_when_wandb_has_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: object) -> None:
        raise ConnectionResetError("Connection lost")

    tracker = Tracker(SimpleNamespace(wandb_mode="disabled"), RunLayout(tmp_path), 0)  # type: ignore[arg-type]
    tracker._wandb = SimpleNamespace(log=broken, finish=broken)
    tracker.log(0, {"a": 1.0})
    tracker.log(1, {"a": 2.0})
    tracker.finish()
    assert [json.loads(line)["a"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1.0,
        2.0,
    ]
    assert capsys.readouterr().out.count("W&B takes no more metrics") == 1
