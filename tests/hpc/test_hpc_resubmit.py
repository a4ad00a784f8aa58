"""Resubmit on this machine, and what a new submission takes over from the last one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.local_job import PATIENCE, SERVICES, Job, wait_until
from helpers.run_files import make_run, submitted_to_slurm

from hpc.resubmit import merge_options, refuse_active, resubmit
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout

pytestmark = pytest.mark.slow

FAKE_RESUBMIT = Path(__file__).parents[1] / "fakes" / "resubmit.py"
STORED = """
[flags]
lr = "1e-4"
[submit]
partition = "gpu"
nodes = 4
time = "4:00:00"
max_restarts = 7
[submit.slurm]
setup = ["module load cuda"]
[submit.slurm.sbatch]
constraint = "ib"
[train]
num_rollout = 10
"""


@pytest.fixture
def stored(tmp_path: Path) -> RunLayout:
    layout = make_run(tmp_path, "x", phase="stopped", attempts=1)
    layout.config.write_text(STORED)
    return layout


def run_again(job: Job, *words: str) -> subprocess.CompletedProcess[str]:
    name, _, value = job.mark.partition("=")
    fake = {"FAKE_PLAN": json.dumps({**SERVICES, "trainer": ["train"]}), "FAKE_ENGINES": "2", name: value}
    return subprocess.run(
        [sys.executable, str(FAKE_RESUBMIT), "job", *words], cwd=job.directory, capture_output=True, text=True,
        env={**os.environ, "PATH": str(job.directory / "bin"), **fake}, timeout=PATIENCE,
    )  # fmt: skip


def test_a_stopped_run_goes_on(job: Job) -> None:
    process = job.start(steps=1000)
    wait_until(lambda: len(job.steps()) > 2)
    refused = run_again(job)
    assert refused.returncode == 2
    assert "job is running on this machine" in refused.stderr and "hpc.cancel job" in refused.stderr
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    done = len(job.steps())

    again = run_again(job, f"--num-rollout={done + 3}")
    assert again.returncode == 0, again.stderr
    assert "resuming job here" in again.stdout
    assert job.steps() == list(range(done + 3))
    assert [event["attempt"] for event in job.events("attempt_started")] == [0, 1]
    over = run_again(job)
    assert over.returncode == 0 and "has finished" in over.stdout


def test_options_are_taken_over_unless_given(stored: RunLayout) -> None:
    options, train = merge_options(stored, [])
    assert (options.name, options.partition, options.nodes, options.time) == ("x", "gpu", 4, "4:00:00")
    assert options.slurm.sbatch == {"constraint": "ib"} and options.slurm.setup == ("module load cuda",)
    assert (options.after, options.detach, train) == ((), False, {})

    words = ["--time=1-0", "--max-restarts", "100", "--detach", "--lr=1e-5"]
    options, train = merge_options(stored, words)
    assert (options.partition, options.time, options.max_restarts) == (
        "gpu",
        "1-0",
        100,
    )  # 100 is the default, too
    assert options.detach and train == {"lr": ["1e-5"]}
    assert merge_options(stored, ["--slurm.sbatch.constraint=eth"])[0].slurm.sbatch == {"constraint": "eth"}
    assert merge_options(stored, [], local=True)[0].partition is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["@demo"], "recipes are not accepted here"),
        (["--tiem=1"], "did you mean --time"),
        (["1:00"], "unexpected argument"),
    ],
)
def test_bad_words(stored: RunLayout, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge_options(stored, words)


def test_options_of_a_slurm_job_for_a_run_of_this_machine(stored: RunLayout) -> None:
    """It would start here, perhaps on a login node."""
    with pytest.raises(UserError, match="--nodes, --time: only for a job on Slurm"):
        resubmit(stored.root, ["--nodes", "4", "--time=4:00:00"], local=True)
    stored.config.write_text("[flags]\n[submit]\n")
    with pytest.raises(UserError, match="--time: only for a job on Slurm"):
        resubmit(stored.root, ["--time=4:00:00"])
    assert merge_options(stored, ["--time=4:00:00", "--partition=gpu"])[0].time == "4:00:00"


def test_chains_are_for_slurm(stored: RunLayout) -> None:
    for chain, local in [(2, True), (-1, False)]:
        with pytest.raises(UserError, match=f"--chain {chain}"):
            resubmit(stored.root, chain=chain, local=local)


def test_without_an_answer_nothing_is_started(stored: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    refuse_active(stored)  # no jobs: nothing to ask
    submitted_to_slurm(stored, "28")
    with pytest.raises(UserError, match="Slurm can't be asked"):
        resubmit(stored.root)
    with pytest.raises(UserError, match="there is no run 'y'"):
        resubmit("y", runs_dir=stored.root.parent)
