"""The example of asynchronous training learns, over a stop too, and never from samples that are too old."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.local_job import wait_until
from helpers.run_files import lines_of

from analysis import load_run
from rltrain.demo.assets import write_assets

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "asynchronous"
STEPS, BATCH = 30, 16 * 8


def submit(runs: Path, *flags: str) -> subprocess.Popen[str]:
    data = runs / "data"
    write_assets(data)
    recipe = [f"@{EXAMPLE / 'recipe.toml'}", "--hf-checkpoint", str(data / "model")]
    where = ["--prompt-data", str(data / "train.jsonl"), "--runs-dir", str(runs), "--name", "ahead"]
    return subprocess.Popen(
        [sys.executable, "-m", "hpc.submit", *recipe, *where, "--wandb-mode", "disabled", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def stop_after_steps(process: subprocess.Popen[str], metrics: Path, steps: int) -> None:
    def are_done() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return len(lines_of(metrics)) >= steps

    wait_until(are_done, 300, f"{steps} steps")
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 130, shown


@pytest.mark.slow
@pytest.mark.learning
def test_it_learns_over_a_stop(tmp_path: Path) -> None:
    stop_after_steps(submit(tmp_path), tmp_path / "ahead" / "metrics.jsonl", 5)
    process = submit(tmp_path)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown

    run = load_run(tmp_path / "ahead")
    assert set(run.steps["attempt"]) == {0, 1}
    assert run.steps["step"].tolist() == list(range(STEPS))
    samples = run.read_samples(columns="tokens").sort_values(["step", "index"])
    assert samples["index"].tolist() == list(range(STEPS * BATCH))

    reward = run.steps["rollout/reward"]
    assert reward.tail(5).mean() > reward.head(2).mean() + 0.35
    assert run.steps["rollout/staleness_max"].max() == 2
    assert run.steps["rollout/staleness_mean"].iloc[4:].mean() > 0.3
    assert run.steps["rollout/staleness_dropped"].sum() == 0
    spans = samples["weight_version_spans"]
    assert (spans.map(len) > 1).any()  # weights came while they were generated
    for step, length, parts in zip(samples["step"], samples["response_length"], spans, strict=True):
        assert [parts[0]["start"], parts[-1]["end"]] == [0, length]
        assert all(step - 2 <= int(part["version"]) <= step for part in parts)


def test_readme_shows_the_flag_of_the_recipe() -> None:
    line = "max-staleness = 2"
    assert line in (EXAMPLE / "README.md").read_text() and line in (EXAMPLE / "recipe.toml").read_text()
