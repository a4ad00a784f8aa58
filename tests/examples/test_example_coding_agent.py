"""The coding agent on the real parts, for two steps of a model that knows nothing: sandboxes, gateway, trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import load_run
from rltrain.agents.sandbox import kinds
from rltrain.run.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_steps_of_the_coding_agent(tmp_path: Path) -> None:
    try:
        kinds.check("bubblewrap")
    except UserError as error:
        pytest.skip(str(error))
    commands = [
        ["-m", "examples.small_model.make", tmp_path],
        ["-m", "examples.coding_agent.make_prompts", tmp_path / "coding_agent.jsonl"],
        [
            "-m", "hpc.submit", "@examples/coding_agent/recipe.toml", "--name", "coding",
            "--runs-dir", tmp_path / "runs",
            "--hf-checkpoint", tmp_path / "model", "--random-init", "--prompt-data", tmp_path / "coding_agent.jsonl",
            "--num-rollout", "2", "--rollout-batch-size", "2", "--n-samples-per-prompt", "2",
            "--rollout-max-response-len", "8", "--wandb-mode", "disabled",
        ],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=900,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = load_run(tmp_path / "runs" / "coding")
    samples = run.read_samples("all")
    assert len(samples) == 8 and samples["failure"].isna().all()
    assert samples["reward"].isin([0, 1]).all()
    assert (run.steps["train/logprob_abs_diff"].dropna() < 1e-4).all()
    for metadata in map(json.loads, samples["metadata"]):
        assert metadata["agent"]["failure"] == "" and metadata["agent"]["answer"].startswith("value = ")
        assert len(metadata["agent_session"]["turns"]) == 1
