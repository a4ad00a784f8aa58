"""Replaying a sample: where tokens and log-probs part, on recorded rollouts of a job without a trainer."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import TOKEN

from analysis import load_run
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample
from rltrain.schema import samples_to_table, table_to_samples, write_table
from rltrain.tools.compare import Scored, compare, first_turn
from rltrain.tools.replay import load_args, main
from rltrain.tools.replay_weights import find_weights


def test_responses_are_compared_as_far_as_they_are_the_same() -> None:
    recorded = Scored([5, 6, 7, 8], [-1.0, None, -2.0, -3.0])
    result = compare(recorded, Scored([5, 6, 7, 9], [-1.5, -9.0, -2.25, -3.0]))
    assert (result.same, result.parts_at, result.compared) == (3, 3, 2)
    assert (result.largest, result.at, result.mean) == (0.5, 0, 0.375)
    assert compare(recorded, recorded).parts_at is None
    assert compare(recorded, Scored([5, 6], [-1.0, -1.0])).parts_at == 2
    assert math.isclose(compare(recorded, Scored([1], [0.0])).mean, 0.0)


def test_only_the_first_turn_can_be_written_again() -> None:
    turn = first_turn([5, 6, 7, 8], [-1.0, -2.0, 0.0, -3.0], [1, 1, 0, 1])
    assert (turn.tokens, turn.log_probs) == ([5, 6], [-1.0, -2.0])


def submit(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc.submit", *map(str, flags), "--wandb-mode", "disabled"]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def recorded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    """A run of two rollouts with --debug-rollout-only."""
    directory = tmp_path_factory.mktemp("replay")
    rows = [{"input": f"{i}+{i}=", "label": "[0-4]"} for i in range(8)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished = submit(
        "--runs-dir", directory, "--name", "rollouts", "--debug-rollout-only", "--hf-checkpoint", tiny_model,
        "--prompt-data", directory / "prompts.jsonl", "--label-key", "label", "--rm-type", "regex",
        "--num-rollout", "2", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2",
        "--rollout-max-response-len", "12",
        "--sglang-enable-deterministic-inference", "--eval-prompt-data", "dev", directory / "prompts.jsonl",
        "--save-debug-rollout-data", directory / "saved-{rollout_id}.parquet",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return RunLayout(directory / "rollouts")


@pytest.mark.slow
def test_rollouts_need_no_trainer(recorded: RunLayout) -> None:
    run = load_run(recorded.root)
    assert run.steps["step"].tolist() == [-1, 0, 1] and run.steps["rollout/tokens"].iloc[1] > 0
    assert "eval/dev" in run.steps
    assert len(run.samples) == 16 and run.samples["decode_seconds"].gt(0).all()
    log = (recorded.latest_logs / "trainer-0.log").read_text()
    assert "Traceback" not in log
    assert not recorded.checkpoints.joinpath("latest_checkpointed_iteration.txt").exists()


@pytest.fixture(scope="module")
def trained(recorded: RunLayout, tiny_model: Path) -> RunLayout:
    """A run that was trained on the recorded rollouts, with a learning rate of 0."""
    parent = recorded.root.parent
    finished = submit(
        "--runs-dir", parent, "--name", "trained", "--hf-checkpoint", tiny_model, "--num-rollout", "2",
        "--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--lr", "0",
        "--load-debug-rollout-data", parent / "saved-{rollout_id}.parquet",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return RunLayout(parent / "trained")


@pytest.mark.slow
def test_recorded_rollouts_can_be_trained_on(trained: RunLayout) -> None:
    steps = load_run(trained.root).steps
    assert steps["step"].tolist() == [0, 1]
    # The weights of the first step are those that wrote the samples; what they became wrote none.
    assert steps["train/logprob_abs_diff"].iloc[0] < 1e-4
    assert steps["train/logprob_abs_diff"].isna().iloc[1]
    assert steps["train/grad_norm"].gt(0).any()


def replay(recorded: RunLayout, *flags: str | Path, index: int = 3) -> int:
    return main([str(recorded.root), "--step", "0", "--index", str(index), *map(str, flags)])


@pytest.mark.slow
def test_a_live_engine_with_the_same_weights_repeats_a_sample(
    recorded: RunLayout, engine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURMLIME_TOKEN", TOKEN)
    assert replay(recorded, "--engine", engine.url) == 0
    shown = capsys.readouterr().out
    assert "log-probs of the recorded tokens: " in shown and "sampled again: " in shown and "→" not in shown
    monkeypatch.setenv("SLURMLIME_TOKEN", "wrong")
    assert replay(recorded, "--engine", engine.url) == 2
    assert "401" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sample_that_was_changed_parts_where_it_was(
    recorded: RunLayout, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SLURMLIME_TOKEN", TOKEN)
    other = RunLayout(tmp_path / "changed")
    shutil.copytree(recorded.root, other.root, symlinks=True)
    directory = other.find_step(0)
    assert directory is not None
    samples = table_to_samples(pq.read_table(directory / "part-0.parquet", partitioning=None))
    samples[3].tokens[-4] = samples[3].tokens[-4] % 40 + 5
    rewards = [sample.reward for sample in samples]
    write_table(samples_to_table(samples, step=0, attempt=0, dataset="train", rewards=rewards), directory)
    assert replay(other, "--engine", engine.url) == 1
    shown = capsys.readouterr().out
    place = samples[3].response_length - 4
    assert f"sampled again: {place} of {place + 4} tokens are the same" in shown and f"→ {place:5}" in shown


@pytest.mark.slow
def test_weights_come_from_a_checkpoint_of_the_run(
    recorded: RunLayout, trained: RunLayout, capsys: pytest.CaptureFixture[str]
) -> None:
    args, sample = load_args(trained), Sample(weight_versions=["1", "2"])
    checkpoint = trained.checkpoints / "iter_0000002"
    assert find_weights(trained, args.checkpoint, args.model, sample) == checkpoint
    assert replay(recorded, "--frozen", checkpoint) == 0  # trained with a rate of 0: the same weights
    shown = capsys.readouterr().out
    assert f"converting {checkpoint}" in shown and "→" not in shown
    (checkpoint / "manifest.json").unlink()
    (checkpoint / ".metadata").unlink()
    with pytest.raises(UserError, match=r"version 2 are not in .*v000002 or .*iter_0000002: give a"):
        find_weights(trained, args.checkpoint, args.model, sample)
    assert replay(recorded, "--frozen", checkpoint) == 2
    assert "is not a model, and its conversion failed: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "index", "words"),
    [("9", "0", "no finished rollout of step 9; it has [0, 1]"), ("0", "99", "no sample 99; it has 0, 1")],
)
def test_what_is_not_there_is_named(
    recorded: RunLayout, capsys: Any, step: str, index: str, words: str
) -> None:
    assert main([str(recorded.root), "--step", step, "--index", index]) == 2
    assert words in capsys.readouterr().err
