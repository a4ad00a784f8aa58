"""A stop does not wait for an unfinished rollout, and saving does not depend on W&B."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from helpers.run_files import lines_of

from rltrain.arguments.config import Config
from rltrain.run import waiting
from rltrain.run.files import read_lines
from rltrain.run.layout import RunLayout
from rltrain.run.metric_lines import newest_rows
from rltrain.tracking import Tracker

if TYPE_CHECKING:  # they import Megatron-core, which a process without these tests need not
    from rltrain.job import Job


@pytest.fixture
def make_job(monkeypatch: pytest.MonkeyPatch) -> object:
    from rltrain import job as job_module

    monkeypatch.setattr(waiting, "_ASK_SECONDS", 0.05)
    monkeypatch.setattr(job_module, "on_rank_0", lambda call: call())
    monkeypatch.setattr("rltrain.megatron.training.share.table_of_rank_0", lambda table: table)
    monkeypatch.setattr(job_module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(job_module, "Tracker", lambda *_: None)

    def make(generate: object, stop: str | None = None) -> Job:
        registry = SimpleNamespace(stop_requested=lambda: stop, status=lambda *_: None)
        job = job_module.Job(None, SimpleNamespace(layout=None, attempt=1), registry)  # type: ignore[arg-type]
        job._rollout = SimpleNamespace(generate=generate, eval=generate)  # type: ignore[assignment]
        return job

    return make


def test_a_finished_rollout_is_taken_even_when_stopping(make_job) -> None:
    assert make_job(lambda i: ("table", {"step": i}), stop="SIGTERM").generate(3) == ("table", {"step": 3})


def test_an_unfinished_one_is_dropped(make_job) -> None:
    never = threading.Event()
    begun = time.monotonic()
    job = make_job(lambda i: never.wait(60), stop="SIGTERM")
    job.begin_evaluation(0)
    assert job.generate(0) is None and job.end_evaluation() is None
    assert time.monotonic() - begun < 30
    never.set()


def test_without_a_stop_it_is_waited_for(make_job) -> None:
    assert make_job(lambda i: time.sleep(0.3) or ("late", {})).generate(0) == ("late", {})


def test_an_evaluation_goes_on_beside_a_rollout(make_job) -> None:
    generated = threading.Event()
    job = make_job(lambda i: generated.set() or ("batch", {}))
    job._rollout.eval = lambda trained: {"eval/dev": float(generated.wait(60))}
    job.begin_evaluation(0)
    assert job.generate(0) == ("batch", {})
    metrics = job.end_evaluation()
    assert metrics["eval/dev"] == 1.0
    assert metrics.keys() == {"eval/dev", "perf/eval_s", "perf/eval_duration_s"}


def test_engines_that_come_back_meanwhile_are_given_the_weights(make_job) -> None:
    there, given = threading.Event(), threading.Event()
    told: list[int] = []

    def answer_when_given(_: int) -> dict[str, float]:
        there.set()
        return {"given": float(given.wait(60))}

    actor = SimpleNamespace(
        lacks_weights=lambda find_engines: there.is_set(),
        update_weights=lambda find_engines, version: (there.clear(), given.set()),
    )
    job = make_job(answer_when_given)
    job._rollout.generate = lambda rollout_id: ("batch", answer_when_given(rollout_id))
    job._rollout.weights = told.append
    newcomers = job.newcomers(actor, 7)
    assert job.generate(7, newcomers) == ("batch", {"given": 1.0}) and told == [7]
    given.clear()
    job.begin_evaluation(0)
    assert job.end_evaluation(newcomers)["given"] == 1.0


def test_errors_are_passed_on(make_job) -> None:
    def broken(rollout_id: int) -> None:
        raise RuntimeError("no prompts")

    job = make_job(broken)
    with pytest.raises(RuntimeError, match="no prompts"):
        job.generate(0)
    job.begin_evaluation(0)
    with pytest.raises(RuntimeError, match="no prompts"):
        job.end_evaluation()


class FakeActorAndJob:
    """An actor and a job in one, which note what the training loop does; evaluation number `stop_at` is interrupted.

    The stop comes while the step after it is generated or trained (`during`): what is waited for then is not there.
    """

    def __init__(self, first: int, evaluated: set[int], stop_at: int | None, during: str = "train") -> None:
        self.start_rollout_id, self.evaluated, self._stop_at = first, evaluated, stop_at
        self._during, self._under_way = during, -1
        self.saved: list[int] = []
        self.rows: list[tuple[int, list[str]]] = []
        self.did: list[str] = []
        self.offload = self
        self.kept: int | None = None

    def generate(self, rollout_id: int, newcomers: object) -> tuple[None, dict[str, float]] | None:
        self.did.append(f"generate {rollout_id}")
        return None if self._during == "generate" and rollout_id == self._stop_at else (None, {})

    def train(self, rollout_id: int, batch: object) -> dict[str, float]:
        self.did.append(f"train {rollout_id}")
        return {"train/loss": 0.0}

    def save(self, rollout_id: int) -> None:
        self.saved.append(rollout_id)
        assert rollout_id in {self.kept, *(step for step, _ in self.rows)}  # not before its row is there

    def keep(self, step: int, metrics: dict[str, float]) -> None:
        assert "train/loss" in metrics
        self.kept = step

    def push_weights(self, actor: object, version: int) -> None:
        self.did.append(f"push {version}")

    def begin_evaluation(self, trained: int) -> None:
        self.did.append(f"begin {trained}")
        self._under_way = trained

    def end_evaluation(self, newcomers: object) -> dict[str, float] | None:
        self.did.append(f"end {self._under_way}")
        return None if self._under_way == self._stop_at else {"eval/dev": 1.0, "perf/eval_s": 0.0}

    def event(self, kind: str, step: int, **metrics: float) -> None:
        self.evaluated.add(step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append((step, sorted(name for name in metrics if not name.startswith("perf/"))))

    def has_evaluated(self, trained: int) -> bool:
        return trained in self.evaluated

    def newcomers(self, actor: object, rollout_id: int) -> None:
        """No engine comes back."""

    def for_generating(self) -> None:
        """The offload's part of the loop: there is no memory to give back."""

    def stop_requested(self) -> None:
        """Only evaluations are interrupted."""

    def catch_up(self, done: int) -> None:
        """W&B lacks nothing."""

    def load(self, rollout_id: int) -> None:
        """There is no rollout process to go on with it."""

    def status(self, phase: str, step: int | None = None) -> None:
        """Nobody watches."""

    def check_logprobs(self, step: int, metrics: dict[str, float]) -> None:
        """There are none."""


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> object:
    from rltrain import train as train_module

    monkeypatch.setattr(train_module.TrainBatch, "from_arrow", lambda table: table)

    def run(fake: FakeActorAndJob, **flags: object) -> int:
        usual = {"num_rollout": 4, "eval_interval": 1, "save_interval": 2}
        return train_module.train(Config().replace(**usual | flags), fake, fake)  # type: ignore[arg-type]

    return run


@pytest.mark.parametrize("during", ["generate", "train"])
@pytest.mark.parametrize("stop_at", [None, 0, 1, 2, 3, 4])
def test_an_interrupted_evaluation_is_done_by_the_next_attempt(
    loop, stop_at: int | None, during: str
) -> None:
    evaluated: set[int] = set()
    runs = [FakeActorAndJob(0, evaluated, stop_at, during)]
    code = loop(runs[0])
    assert code == (0 if stop_at is None else 75)
    if code:
        runs.append(FakeActorAndJob(max([0, *(i + 1 for i in runs[0].saved)]), evaluated, None))
        assert runs[1].start_rollout_id == stop_at  # saved there, whatever the interval
        assert loop(runs[1]) == 0

    assert evaluated == {0, 1, 2, 3, 4}
    rows = [row for run in runs for row in run.rows]
    trained = [step for step, names in rows if "train/loss" in names]
    assert trained == [0, 1, 2, 3]
    assert [step for step, names in rows if "eval/dev" in names] == [-1, 0, 1, 2, 3]
    assert [step for step, _ in rows] == [-1, 0, 0, 1, 1, 2, 2, 3, 3]  # W&B's steps never go back


def test_where_determinism_is_asked_for_an_evaluation_shares_no_batch_with_a_rollout(loop) -> None:
    run = FakeActorAndJob(0, set(), None)
    assert loop(run, num_rollout=2, eval_interval=1, sglang={"enable_deterministic_inference": True}) == 0
    assert run.did == [
        *("push 0", "begin 0", "end 0", "generate 0", "train 0"),
        *("push 1", "begin 1", "end 1", "generate 1", "train 1", "push 2", "begin 2", "end 2"),
    ]


@pytest.mark.parametrize("first", [0, 3])
def test_a_run_without_rollouts_evaluates_the_weights_it_starts_with(loop, first: int) -> None:
    run = FakeActorAndJob(first, set(), None)
    assert loop(run, num_rollout=0, eval_interval=5) == 0
    assert run.did == [f"push {first}", f"begin {first}", f"end {first}"] and run.saved == []


def test_an_evaluation_ends_before_the_engines_get_other_weights(loop) -> None:
    run = FakeActorAndJob(0, set(), None)
    assert loop(run, num_rollout=3, eval_interval=2) == 0
    assert run.did == [
        *("push 0", "begin 0", "generate 0", "train 0", "end 0", "push 1", "generate 1", "train 1"),
        *("push 2", "begin 2", "generate 2", "train 2", "end 2", "push 3", "begin 3", "end 3"),
    ]


@pytest.mark.parametrize("flags", [{"offload_rollout": True}, {"save_interval": 5}])
def test_it_ends_before_training_that_takes_the_engines_memory_or_weights_that_are_nowhere_else(
    loop, flags: dict[str, object]
) -> None:
    run = FakeActorAndJob(0, set(), None)
    assert loop(run, num_rollout=3, eval_interval=2, **flags) == 0
    assert run.did[-8:] == [
        *("push 2", "begin 2", "generate 2", "end 2", "train 2", "push 3", "begin 3", "end 3"),
    ]


@pytest.mark.parametrize(
    ("first", "changes", "owed"),
    [
        (0, {}, True),
        (0, {"skip_eval_before_train": True}, False),
        (0, {"eval_interval": None}, False),
        (2, {}, True),
        (3, {}, False),
        (5, {}, True),  # the last one, whatever the interval
    ],
)
def test_an_attempt_begins_with_the_evaluation_that_its_weights_lack(
    first: int, changes: dict[str, object], owed: bool
) -> None:
    from rltrain.evaluation import owes_evaluation

    config = Config().replace(**{"eval_interval": 2, "num_rollout": 5, **changes})
    assert owes_evaluation(config, first) is owed


def online_run(run_dir: Path, logged: list[dict[str, float]], last_step: int) -> SimpleNamespace:
    """A fake of W&B's run, whose server has all up to a step."""
    files = run_dir / "wandb" / "run-20260101_000000-x" / "files"
    return SimpleNamespace(
        id="x", dir=str(files), log=logged.append, offline=False, summary={"step": last_step}
    )


def test_a_step_whose_attempt_died_behind_its_checkpoint_is_in_the_metrics(tmp_path: Path) -> None:
    layout, logged = RunLayout(tmp_path), []
    config = Config().replace(wandb_mode="disabled")
    first = Tracker(config, layout, 0)
    first.log(0, {"train/loss": 2.0, "perf/step_s": 1.0})
    first.keep(1, {"train/loss": 1.0})  # the checkpoint is written; an engine dies while it gets the weights
    second = Tracker(config, layout, 1)
    second._wandb = online_run(tmp_path, logged, last_step=0)
    second.catch_up(2)
    second.log(2, {"train/loss": 0.5})
    assert [(row["step"], row["train/loss"]) for row in logged] == [(1, 1.0), (2, 0.5)]
    rows = newest_rows(read_lines(layout.metrics))
    assert {step: row["attempt"] for step, row in rows.items()} == {0: 0, 1: 0, 2: 1}


def test_metrics_are_kept_when_wandb_has_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: object) -> None:
        raise ConnectionResetError("Connection lost")

    tracker = Tracker(Config().replace(wandb_mode="disabled"), RunLayout(tmp_path), 0)  # type: ignore[arg-type]
    tracker._wandb = SimpleNamespace(log=broken, finish=broken)
    tracker.log(0, {"a": 1.0})
    tracker.log(1, {"a": 2.0})
    tracker.finish()
    assert [row["a"] for row in lines_of(tmp_path / "metrics.jsonl")] == [1.0, 2.0]
    assert capsys.readouterr().out.count("W&B accepts no more metrics") == 1


def test_wandb_gets_an_evaluation_that_came_after_its_row_again(tmp_path: Path) -> None:
    lines = [{"step": 0, "a": 1.0}, {"step": 1, "a": 2.0}, {"step": 1, "eval/dev": 0.5, "perf/eval_s": 1.0}]
    layout = RunLayout(tmp_path)
    layout.metrics.write_text(
        "".join(json.dumps({"attempt": 0, "time": 0.0} | line) + "\n" for line in lines)
    )
    tracker = Tracker(Config().replace(wandb_mode="disabled"), layout, 1)
    logged: list[dict[str, float]] = []
    tracker._wandb = online_run(tmp_path, logged, last_step=1)
    tracker.catch_up(2)
    assert logged == [{"step": 1, "a": 2.0, "eval/dev": 0.5, "perf/eval_s": 1.0}]


def test_an_answer_that_timed_out_is_an_error_and_no_reason_to_wait_on() -> None:
    def times_out(_: int) -> None:
        raise TimeoutError("the rollout process's node is gone")

    registry = SimpleNamespace(stop_requested=lambda: None)
    with pytest.raises(TimeoutError, match="node is gone"):
        waiting.unless_stopped(registry, times_out, 0)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_rank_starts_without_wandb_and_what_asks_engines_and_can_import_them_later() -> None:
    code = """
import rltrain.train, sys
print([name for name in ("wandb", "flashinfer", "aiohttp", "transformers") if name in sys.modules])
import wandb
print(wandb.__name__)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\nwandb\n", done.stdout + done.stderr
