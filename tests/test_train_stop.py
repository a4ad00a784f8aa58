"""A stop does not wait for an unfinished rollout, and saving does not depend on W&B."""

from __future__ import annotations

import json
import threading
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc.layout import RunLayout
from rltrain import job as job_module
from rltrain import stop as stop_module
from rltrain import train as train_module
from rltrain.job import Job
from rltrain.tracking import Tracker


@pytest.fixture
def make_job(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(stop_module, "_ASK_SECONDS", 0.05)
    monkeypatch.setattr(job_module, "on_rank_0", lambda call: call())

    def make(generate: object, stop: str | None = None) -> Job:
        job = Job.__new__(Job)
        job._rollout = SimpleNamespace(generate=generate, eval=generate)  # type: ignore[assignment]
        job._registry = SimpleNamespace(stop_requested=lambda: stop)  # type: ignore[assignment]
        return job

    return make


def test_a_finished_rollout_is_taken_even_when_stopping(make_job) -> None:
    assert make_job(lambda i: ("table", {"step": i}), stop="SIGTERM").generate(3) == ("table", {"step": 3})


def test_an_unfinished_one_is_dropped(make_job) -> None:
    never = threading.Event()
    begun = time.monotonic()
    job = make_job(lambda i: never.wait(60), stop="SIGTERM")
    assert job.generate(0) is None and job.evaluate(0) is None
    assert time.monotonic() - begun < 5
    never.set()


def test_without_a_stop_it_is_waited_for(make_job) -> None:
    assert make_job(lambda i: time.sleep(0.3) or "late").generate(0) == "late"


def test_errors_are_passed_on(make_job) -> None:
    def broken(rollout_id: int) -> None:
        raise RuntimeError("no prompts")

    with pytest.raises(RuntimeError, match="no prompts"):
        make_job(broken).generate(0)


class FakeRun:
    """An actor and a job in one, which note what the training loop does; evaluation number `stop_at` is interrupted."""

    def __init__(self, first: int, evaluated: set[int], stop_at: int | None) -> None:
        self.start_rollout_id, self.evaluated, self._stop_at = first, evaluated, stop_at
        self.saved: list[int] = []
        self.rows: list[tuple[int, list[str]]] = []
        self.offload = self

    def train(self, rollout_id: int, batch: object) -> dict[str, float]:
        return {"train/loss": 0.0}

    def save(self, rollout_id: int) -> None:
        self.saved.append(rollout_id)

    def evaluate(self, trained: int) -> dict[str, float] | None:
        return None if trained == self._stop_at else {"eval/dev": 1.0}

    def event(self, kind: str, step: int, **metrics: float) -> None:
        self.evaluated.add(step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append((step, sorted(name for name in metrics if not name.startswith("perf/"))))

    def has_evaluated(self, trained: int) -> bool:
        return trained in self.evaluated

    def generate(self, rollout_id: int) -> tuple[None, dict[str, float]]:
        return None, {}

    def __getattr__(self, name: str) -> object:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("stop_at", [None, 0, 2, 3, 4])
def test_an_interrupted_evaluation_is_done_by_the_next_attempt(
    monkeypatch: pytest.MonkeyPatch, stop_at: int | None
) -> None:
    monkeypatch.setattr(train_module.TrainBatch, "from_arrow", lambda table: table)
    args = Namespace(num_rollout=4, eval_interval=1, save_interval=2, update_weights_interval=1)
    args.skip_eval_before_train = False
    evaluated: set[int] = set()
    runs = [FakeRun(0, evaluated, stop_at)]
    code = train_module.train(args, runs[0], runs[0])  # type: ignore[arg-type]
    assert code == (0 if stop_at is None else 75)
    if code:
        runs.append(FakeRun(max([0, *(i + 1 for i in runs[0].saved)]), evaluated, None))
        assert runs[1].start_rollout_id == stop_at  # saved there, whatever the interval
        assert train_module.train(args, runs[1], runs[1]) == 0  # type: ignore[arg-type]

    assert evaluated == {0, 1, 2, 3, 4}
    rows = [row for run in runs for row in run.rows]
    trained = [step for step, names in rows if "train/loss" in names]
    assert trained == [0, 1, 2, 3]
    assert [step for step, names in rows if "eval/dev" in names] == [-1, 0, 1, 2, 3]


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
