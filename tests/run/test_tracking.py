"""What W&B lacks after its process has died is given to it by the next attempt; rows that come in parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis import load_run, load_wandb
from hpc.runs.progress import RunState
from rltrain.arguments.config import Config
from rltrain.job import evaluated_steps
from rltrain.run.errors import UserError
from rltrain.run.files import read_lines
from rltrain.run.layout import RunLayout
from rltrain.run.metric_lines import newest_rows
from rltrain.tracking import Tracker, last_step

HERE = Path(__file__).parents[1]


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    layout = RunLayout(tmp_path / "run")
    layout.root.mkdir()
    layout.run_json.write_text(json.dumps({"wandb_run_id": "abc"}))
    return layout


# In a process of its own, as one whose W&B has died is not to be used any more.
FIRST_ATTEMPT = """
import os, signal, sys, psutil
from offline_tracker import make_tracker
tracker = make_tracker(sys.argv[1], 0)
tracker.catch_up(0)
tracker.log(-1, {"eval/dev": 0.25})
for step in range(3):
    tracker.log(step, {"train/loss": step / 7})
children = psutil.Process().children(recursive=True)
for child in children:  # as Slurm's SIGTERM to every process of a step does it
    os.kill(child.pid, signal.SIGTERM)
psutil.wait_procs(children, timeout=30)
while tracker._wandb is not None:  # until its absence is noticed
    step += 1
    tracker.log(step, {"train/loss": step / 7})
tracker.log(step + 1, {"train/loss": 0.5})
tracker.finish()
"""
# The first attempt's last step is not in its checkpoint, and trained again.
SECOND_ATTEMPT = """
import json, sys
from offline_tracker import make_tracker
from rltrain.tracking import last_step
tracker = make_tracker(sys.argv[1], 1)
done = int(sys.argv[2])
print(json.dumps(last_step(tracker._wandb)))
tracker.catch_up(done)
tracker.log(done, {"train/loss": 9.0})
tracker.finish()
"""


# Raises what the real one does after the server has said nothing for a minute and a half, or at once if it refuses.
WITHOUT_SERVER = """
import sys, wandb
from pathlib import Path
from wandb.errors import CommError
from rltrain.arguments.config import Config
from rltrain.run.layout import RunLayout
from rltrain.tracking import Tracker
real = wandb.init
def silent_init(**words):
    if words["mode"] == "online":
        raise CommError(sys.argv[2])
    return real(**words)
wandb.init = silent_init
try:
    tracker = Tracker(Config().replace(wandb_mode="online"), RunLayout(Path(sys.argv[1])), 0)
except CommError as error:
    sys.exit(print("raised", error))
tracker.catch_up(0)
tracker.log(0, {"train/loss": 0.5})
tracker.finish()
"""


def run_attempt(program: str, *words: object) -> str:
    python_path = os.pathsep.join([str(HERE / "fakes"), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_next_attempt_gives_wandb_what_it_lacks(layout: RunLayout) -> None:
    assert "W&B accepts no more metrics" in run_attempt(FIRST_ATTEMPT, layout.root)
    done = max(newest_rows(read_lines(layout.metrics)))
    seen = json.loads(run_attempt(SECOND_ATTEMPT, layout.root, done))
    assert seen is None  # what the first attempt's W&B has written is not known, and is all logged again
    third = json.loads(run_attempt(SECOND_ATTEMPT, layout.root, done + 1))
    assert third == done
    done += 1

    run = load_wandb(layout.root, strict=True)
    logged = [int(step) for step in run.read_steps(every_attempt=True)["step"]]
    assert logged == list(range(-1, done + 1))  # no gap, no repeat, in order
    steps = run.steps.set_index("step")
    losses = [step / 7 for step in range(done - 1)] + [9.0, 9.0]
    assert steps["train/loss"].dropna().tolist() == losses
    assert steps["eval/dev"].dropna().tolist() == [0.25]


def test_the_newest_offline_attempt_is_known_though_the_clock_jumped_back(tmp_path: Path) -> None:
    said = {"100000": '{"attempt": 1, "step": 7}', "110000": '{"attempt": 0, "step": 3}', "120000": "1"}
    for time, text in said.items():
        attempt = tmp_path / f"offline-run-20260101_{time}-abc"
        attempt.mkdir()
        (attempt / "slurmlime-last-step").write_text(text)
    own = tmp_path / "offline-run-20260101_103000-abc" / "files"
    run = SimpleNamespace(offline=True, id="abc", dir=str(own))
    assert last_step(run) == 7


@pytest.mark.slow
def test_a_server_that_does_not_answer_does_not_keep_a_run_from_training(layout: RunLayout) -> None:
    why = "Failed to get resume status for run abc: context deadline exceeded"
    assert "W&B does not answer: Failed to get" in run_attempt(WITHOUT_SERVER, layout.root, why)
    assert [row["step"] for row in read_lines(layout.metrics)] == [0]
    (attempt,) = (layout.root / "wandb").glob("offline-run-*-abc")
    assert json.loads((attempt / "slurmlime-last-step").read_text()) == {"attempt": 0, "step": 0}

    # The next attempt reaches it, and sends what lies in metrics.jsonl: nobody must sync it, too.
    run = SimpleNamespace(
        offline=False, id="abc", dir=str(attempt.parent / "run-2-abc" / "files"), summary={}
    )
    assert last_step(run) is None
    assert [path.name for path in attempt.parent.glob("*/offline-run-*")] == [attempt.name]

    assert "raised permission denied" in run_attempt(WITHOUT_SERVER, layout.root, "permission denied")


def test_an_evaluation_that_comes_later_belongs_to_its_step(layout: RunLayout) -> None:
    args = Config().replace(wandb_mode="disabled")
    first = Tracker(args, layout, 0)
    first.log(0, {"train/loss": 1.0})
    first.log(1, {"train/loss": 2.0, "train/lr": 0.1})
    first.finish()
    layout.metrics.write_text(layout.metrics.read_text() + '{"step": 2, "train/l')  # cut short by a crash
    second = Tracker(args, layout, 1)
    second.catch_up(2)
    second.log(1, {"eval/dev": 0.5})
    second.log(2, {"train/loss": 3.0})
    second.finish()

    state = RunState()
    for line in layout.metrics.read_text().splitlines():
        if line.endswith("}"):
            state.add_metrics(json.loads(line))
    rows = newest_rows(read_lines(layout.metrics))
    (layout.root / "config.toml").write_text("[train]\n")
    steps = load_run(layout.root).steps
    assert steps["attempt"].tolist() == [0, 0, 1]
    for row in (state.metrics[1], rows[1], steps.iloc[1]):
        assert (row["train/loss"], row["train/lr"], row["eval/dev"]) == (2.0, 0.1, 0.5)
    assert len(load_run(layout.root).read_steps(every_attempt=True)) == 3


def test_evaluations_that_are_done(layout: RunLayout) -> None:
    assert evaluated_steps(layout.events) == set()
    layout.events.write_text(
        '{"kind": "eval_finished", "step": 0}\n{"kind": "checkpoint_saved", "step": 3}\n'
        '{"kind": "eval_finished", "step": 10}\n'
    )
    assert evaluated_steps(layout.events) == {0, 10}


def test_tensorboard_has_the_same_numbers_under_the_same_names(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    flags = {
        "wandb_mode": "disabled",
        "use_tensorboard": True,
        "tb_project_name": "p",
        "tb_experiment_name": "e",
    }
    config = Config().replace(**flags)
    for attempt, done in ((0, 0), (1, 1)):  # the second one trains step 1 again
        tracker = Tracker(config, layout, attempt)
        tracker.catch_up(done)
        for step in range(done, 2):
            tracker.log(step, {"train/loss": float(10 * attempt + step)})
        tracker.finish()
    events = reading.EventAccumulator(str(layout.root / "tensorboard" / "p" / "e")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(0, 0.0), (1, 11.0)]


def test_without_the_package_that_is_said(layout: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = Config().replace(wandb_mode="disabled", use_tensorboard=True)
    with pytest.raises(UserError, match=r"--use-tensorboard: .*pip install tensorboard"):
        Tracker(config, layout, 0)
