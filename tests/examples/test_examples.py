"""The examples that begin with the small model: each learns, on the real parts, and does what its README says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis import Run, load_run
from hpc.submitting.command_line import read_request
from rltrain.arguments import parse
from rltrain.arguments.flags import to_argv
from rltrain.inputs import check_inputs

pytestmark = [pytest.mark.slow, pytest.mark.learning]

ROOT = Path(__file__).parents[2]


def python(*command: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=540,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `examples/small_model` makes, the taught model included."""
    directory = tmp_path_factory.mktemp("examples") / "small_model"
    python("-m", "examples.small_model.make", directory)
    (directory / "config.toml").write_text(f"search_documents = '{directory / 'documents.txt'}'\n")
    python(
        "-m", "hpc.submit", "@examples/small_model/recipe.toml", "--name", "taught", "--runs-dir", directory / "runs",
        "--hf-checkpoint", directory / "model", "--prompt-data", directory / "lessons.jsonl",
        "--save-hf", directory / "taught",
    )  # fmt: skip
    return directory


def learn(data: Path, example: str, *flags: str | Path) -> Run:
    python(
        "-m", "hpc.submit", f"@examples/{example}/recipe.toml", "--name", example, "--runs-dir", data / "runs",
        "--hf-checkpoint", data / "taught", "--prompt-data", data / f"{example}.jsonl", "--wandb-mode", "disabled",
        "--sglang-enable-deterministic-inference", *flags,
    )  # fmt: skip
    run = load_run(data / "runs" / example)
    assert run.samples["failure"].isna().all()
    assert (run.steps["train/logprob_abs_diff"].dropna() < 1e-4).all()
    return run


def gain(run: Run) -> float:
    """Reward of the last two steps above that of the first."""
    rewards = run.steps["rollout/reward"]
    return rewards.tail(2).mean() - rewards.iloc[0]


def test_calculator(data: Path) -> None:
    run = learn(data, "calculator")
    assert gain(run) > 0.2
    samples = run.read_samples("all")
    called = samples[samples["response"].str.contains(r"^\[\d+\*\d+\]\d+;", regex=True)]
    assert len(called) > 0.5 * len(samples)
    for _, sample in called.head(
        20
    ).iterrows():  # one token a character: masked is exactly what the calculator wrote
        start = sample["response"].index("]") + 1
        end = sample["response"].index(";") + 1
        assert np.flatnonzero(sample["loss_mask"] == 0).tolist()[: end - start] == list(range(start, end))
        assert (np.asarray(sample["rollout_log_probs"])[start:end] == 0).all()


def test_calculator_agent(data: Path) -> None:
    """The same as a program with OpenAI's client: what the calculator says is between two turns, and masked."""
    run = learn(data, "calculator_agent", "--prompt-data", data / "calculator.jsonl")
    assert gain(run) > 0.15
    samples = run.read_samples("all")
    for _, sample in samples[samples["response"].str.contains(r"^\[\d+\*\d+\]\d+;", regex=True)].iterrows():
        between = range(sample["response"].index("]") + 1, sample["response"].index(";") + 1)
        assert np.flatnonzero(sample["loss_mask"] == 0).tolist()[: len(between)] == list(between)


def test_coding_agent(data: Path) -> None:
    python("-m", "examples.coding_agent.make_prompts", data / "coding_agent.jsonl")
    run = learn(data, "coding_agent")
    assert gain(run) > 0.15


def test_search(data: Path) -> None:
    run = learn(data, "search", "--custom-config-path", data / "config.toml")
    assert gain(run) > 0.1
    responses = run.read_samples("text")
    words = responses["response"].str.extract(r"^\[([a-z ]*)\]")[0].str.split().str.len()
    asked_for_both = words.eq(2).groupby(responses["step"]).mean()
    assert asked_for_both.iloc[-2:].mean() > asked_for_both.iloc[0]


def test_step_by_step(data: Path) -> None:
    run = learn(data, "step_by_step")
    assert gain(run) > 0.15
    samples = run.samples
    rollouts = samples.groupby("rollout_id")
    assert len(rollouts) == 8 * 32 * 8 and samples["index"].is_unique
    assert set(rollouts.size()) >= {1, 2, 3}
    assert (rollouts["reward"].nunique() == 1).all() and (rollouts["train_reward"].nunique() == 1).all()
    first = samples[samples["step"] == 0].drop_duplicates("rollout_id")
    assert run.steps["rollout/reward"].iloc[0] == pytest.approx(first["reward"].mean())


def test_curriculum(data: Path) -> None:
    run = learn(data, "curriculum", "--eval-prompt-data", "all-levels", data / "curriculum_eval.jsonl")
    before, after = run.evals.groupby("step")["reward"].mean()
    assert after > before + 0.05
    levels = run.samples.assign(
        level=run.read_samples("text")["metadata"].str.extract(r'"level": (\d)')[0].astype(int)
    )
    assert levels[levels["step"] == 0]["level"].max() == 0
    assert levels["level"].max() == 1  # opened


@pytest.mark.parametrize("example", ["calculator", "search", "step_by_step", "curriculum"])
def test_the_recipes_are_right_as_they_are(data: Path, example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the paths of the README: everything is found where the recipe says."""
    monkeypatch.chdir(data.parent)
    (data.parent / "data").mkdir(exist_ok=True)
    if not (data.parent / "data" / "small_model").exists():
        (data.parent / "data" / "small_model").symlink_to(data)
        (data.parent / "examples").symlink_to(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT)
    check_inputs(parse(to_argv(read_request([f"@{ROOT}/examples/{example}/recipe.toml"]).train)))
