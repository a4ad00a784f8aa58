"""What a storm with real roles is judged by: its samples, and W&B's record. Each fault of a record is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hpc.chaos import records
from rltrain.run.layout import RunLayout
from tests.helpers.synthetic_run import GROUP_SIZE, GROUPS, write_run

STEPS, BATCH = 3, 2
TESTS = Path(__file__).parents[1]
# In a process of its own, as one that is killed takes W&B's with it.
ATTEMPT = """
import os, sys
from offline_tracker import make_tracker
attempt, first, end, ends_well = map(int, sys.argv[2:])
tracker = make_tracker(sys.argv[1], attempt)
tracker.catch_up(first)
for step in range(first, end):
    tracker.log(step, {"train/loss": step / 7})
if ends_well:
    tracker.finish()
os._exit(0)
"""


def frame(**changes: Any) -> pd.DataFrame:
    """Two samples a step, all in order."""
    count = STEPS * BATCH
    columns = {
        "index": list(range(count)),
        "step": [i // BATCH for i in range(count)],
        "attempt": [0] * count,
        "reward": [i % 2 * 1.0 for i in range(count)],
        "response_length": [2] * count,
        "tokens": [[9, i, i + 1] for i in range(count)],
    }
    return pd.DataFrame(columns | changes)


def test_a_run_is_judged_by_its_files(tmp_path: Path) -> None:
    """Its second attempt began again two steps before the end of the first one, whose batch of one of them is there."""
    layout = write_run(tmp_path / "run", steps=6)
    shutil.rmtree(layout.step_dir(3, 1))
    problems, kept = records.judge(layout, 6, layout)
    assert problems == [
        "the reward of steps [3] differs from their samples",
        "the response_length of steps [3] differs from their samples",
        "batches were finished and generated again: {4: ['attempt=0', 'attempt=1']}",
        f"W&B: {layout.root} holds no W&B file.",
    ]
    assert kept.samples == GROUPS * GROUP_SIZE and kept.tokens > kept.samples
    shutil.rmtree(layout.step_dir(5, 1).parent)
    problems, _ = records.judge(layout, 6, None)
    assert problems[0] == "steps with a number of samples other than 16: {5: 0}"


def test_batches() -> None:
    assert records.of_batches(frame(), STEPS, BATCH) == []
    assert records.of_batches(frame().iloc[:-1], STEPS, BATCH) == [
        "steps with a number of samples other than 2: {2: 1}",
        "samples were drawn and not trained: [5]",
    ]
    assert records.of_batches(frame(index=[0, 1, 2, 1, 4, 5]), STEPS, BATCH) == [
        "samples were trained twice: [1]",
        "samples were drawn and not trained: [3]",
    ]
    assert "there are samples of steps [2]" in " ".join(records.of_batches(frame(), STEPS - 1, BATCH))


def test_metrics_are_those_of_the_samples() -> None:
    rows = pd.DataFrame({"step": range(STEPS), "rollout/reward": 0.5, "rollout/response_length": 2.0})
    assert records.of_metrics(frame(), rows) == []
    rows.loc[1, "rollout/reward"] = 0.75
    assert records.of_metrics(frame(), rows) == ["the reward of steps [1] differs from their samples"]


def test_samples_are_those_of_an_undisturbed_run() -> None:
    assert records.of_tokens(frame(), frame()) == []
    other = frame(tokens=[[9, i, i + (i == 4)] for i in range(1, 7)])
    assert records.of_tokens(frame(), other)[0].startswith(
        "6 samples differ from an undisturbed run, from step 0"
    )


def test_no_finished_batch_is_thrown_away(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    for step, attempt in [(0, 0), (1, 0), (1, 2)]:
        layout.step_dir(step, attempt).mkdir(parents=True)
        (layout.step_dir(step, attempt) / "part-0.parquet").touch()
    (found,) = records.of_finished(layout)
    assert found.endswith("generated again: {1: ['attempt=0', 'attempt=2']}")
    (layout.step_dir(1, 0) / "part-0.parquet").unlink()  # it had not been finished
    assert records.of_finished(layout) == []


def test_begun_responses_go_on_as_they_stood(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    layout.rollout_state.mkdir(parents=True)
    aside = [
        {"index": 3, "tokens": [9, 3], "response_length": 1},
        {"index": 2, "tokens": [9], "response_length": 0},
    ]
    trained = {"index": 0, "tokens": [0], "response_length": 5}  # before this state: as it was, so no matter
    (layout.rollout_state / "0000000.json").write_text(json.dumps({"buffer": [aside, [trained]]}))
    assert records.begun_responses(layout, frame()) == ([1], [])
    lost = frame(tokens=[[9, 7, 7]] * STEPS * BATCH)
    assert records.begun_responses(layout, lost) == ([1], ["responses lost tokens that they had: [3]"])


@pytest.mark.parametrize(
    ("seen", "safe", "found"),
    [
        ([0, 1, 2], STEPS, []),
        ([-1, 0, 1, 2], STEPS, []),
        ([0, 1], 0, []),
        ([0, 1], 2, []),
        ([0], 2, ["W&B lacks steps [1, 2]"]),
        ([0, 1], STEPS, ["W&B lacks steps [2]"]),
        ([0, 2], 0, ["W&B lacks steps [1]"]),
        ([0, 1, 1, 2], STEPS, ["W&B has steps twice: [1]"]),
    ],
)
def test_steps_of_wandb(seen: list[int], safe: int, found: list[str]) -> None:
    assert records.of_wandb_rows(seen, STEPS, safe) == found


def test_wandb_has_one_run(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    layout.run_json.write_text(json.dumps({"wandb_run_id": "ours"}))
    assert records.of_wandb(layout, STEPS) == [f"W&B: {tmp_path} holds no W&B file."]
    (layout.root / "wandb/unfinished/offline-run-20260101_000000-other").mkdir(parents=True)
    assert records.of_wandb(layout, STEPS) == ["W&B has further runs: ['offline-run-20260101_000000-other']"]


@pytest.mark.slow
def test_wandb_of_attempts_of_which_one_was_killed(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    layout.run_json.write_text(json.dumps({"wandb_run_id": "ours"}))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "fakes")))}
    for words in ("0 0 2 1", "1 2 3 0", "2 2 3 1"):
        subprocess.run([sys.executable, "-c", ATTEMPT, str(tmp_path), *words.split()], env=env, check=True)
        # The one that was killed may lack what came after the whole one, and nothing else.
        assert records.of_wandb(layout, 2 if words.startswith("0") else STEPS) == []
    first = min((tmp_path / "wandb").glob("offline-run-*"))
    shutil.rmtree(first)
    assert records.of_wandb(layout, STEPS) == ["W&B lacks steps [0, 1]"]
