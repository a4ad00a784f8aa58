"""Real engines, real trainers, real Slurm: four nodes of the sandbox."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.run_files import events_of, lines_of
from helpers.slurm_fixture import submit as submit_script
from helpers.slurm_fixture import until

from hpc.sandbox import Sandbox
from rltrain.run.layout import RunLayout

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
FLAGS = [
    *(
        "--num-gpus-per-node=1",
        "--rollout-batch-size=4",
        "--n-samples-per-prompt=4",
        "--rollout-max-response-len=12",
    ),
    *("--label-key=label", "--custom-rm-path=fakes.reward.by_content", "--lr=1e-3", "--save-interval=100"),
    *("--rollout-shuffle", "--sglang-enable-deterministic-inference"),
]


class Runs:
    """Submits runs of a tiny model."""

    def __init__(self, directory: Path, cluster: Sandbox, model: Path, prompts: Path) -> None:
        self.directory, self.cluster = directory, cluster
        self.inputs = [f"--hf-checkpoint={model}", f"--prompt-data={prompts}"]

    def start(self, name: str, *flags: str) -> tuple[subprocess.Popen[str], RunLayout]:
        python_path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
        process = subprocess.Popen(
            [sys.executable, "-m", "hpc.submit", f"--name={name}", *self.inputs, *FLAGS, *flags],
            cwd=self.directory,
            env={**self.cluster.env, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return process, RunLayout(self.directory / "runs" / name)

    def finish(self, name: str, *flags: str) -> RunLayout:
        process, layout = self.start(name, *flags)
        end(process, layout)
        return layout


def end(process: subprocess.Popen[str], layout: RunLayout) -> None:
    out, err = process.communicate(timeout=900)  # with the other tests beside it a run takes two minutes
    assert process.returncode == 0, f"{out}\n{err}"


def curve(layout: RunLayout) -> list[tuple]:
    names = ("step", "rollout/reward", "rollout/response_length", "train/pg_loss", "train/grad_norm")
    return [tuple(record[name] for name in names) for record in lines_of(layout.metrics)]


@pytest.fixture
def runs(idle_cluster: Sandbox, tmp_path: Path, tiny_model: Path, prompt_file: Path) -> Iterator[Runs]:
    yield Runs(tmp_path, idle_cluster, tiny_model, prompt_file)


STEPS = 12
LAYOUTS = {
    "het": ["--nodes=4"],
    "plain": ["--nodes=4", "--placement=plain"],
    "colocated": ["--nodes=2", "--colocate"],
}


@pytest.fixture(scope="module")
def whole(
    slurm_cluster: Sandbox, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> tuple[list[tuple], Path]:
    """The curve of a run that nothing has happened to, and its prompts."""
    directory = tmp_path_factory.mktemp("whole")
    prompts = directory / "prompts.jsonl"
    rows = [{"input": f"{i}+{i % 7}=", "label": str(i + i % 7)} for i in range(20)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = Runs(directory, slurm_cluster, tiny_model, prompts)
    layout = runs.finish("whole", "--partition=gpu", *LAYOUTS["het"], f"--num-rollout={STEPS}")
    assert [record["step"] for record in lines_of(layout.metrics)] == list(range(STEPS))
    assert all(record["train/logprob_abs_diff"] < 1e-4 for record in lines_of(layout.metrics))
    return curve(layout), prompts


# The others differ for the supervisor only; test_slurm_job.py preempts them too.
@pytest.mark.parametrize(
    "kind", ["het", *(pytest.param(kind, marks=pytest.mark.learning) for kind in ("plain", "colocated"))]
)
def test_preempted_run_equals_an_uninterrupted_one(
    kind: str, whole: tuple[list[tuple], Path], idle_cluster: Sandbox, tmp_path: Path, tiny_model: Path
) -> None:
    expected, prompts = whole
    runs = Runs(tmp_path, idle_cluster, tiny_model, prompts)
    flags = ("--partition=lowgrace", *LAYOUTS[kind], f"--num-rollout={STEPS}")
    process, layout = runs.start("preempted", *flags)
    until(lambda: len(lines_of(layout.metrics)) >= 2, 480, "two steps")
    hosts = {f"{e['role']}-{e['index']}": e["host"] for e in events_of(layout, "role_ready")}
    assert (hosts["trainer-0"] in (hosts["engine-0"], hosts["engine-1"])) == (kind == "colocated")
    submit_script(runs.cluster, "sleep 1", "-p", "high", "-w", hosts["engine-0"], "--exclusive")
    end(process, layout)

    attempts = [record["attempt"] for record in lines_of(layout.metrics)]
    assert attempts[0] == 0 and attempts[-1] == 1 and attempts == sorted(attempts)
    assert curve(layout) == expected


def test_engine_that_spans_two_nodes(runs: Runs) -> None:
    size = ("--rollout-num-gpus-per-engine=2", "--nodes=3", "--num-rollout=2")
    layout = runs.finish("spanning", "--partition=gpu", *size)
    assert [record["step"] for record in lines_of(layout.metrics)] == [0, 1]
    assert all(record["train/logprob_abs_diff"] < 1e-4 for record in lines_of(layout.metrics))
    logs = [layout.log_dir(0) / name for name in ("engine-0.log", "engine-0.node1.log")]
    assert ["TP0]" in log.read_text() for log in logs] == [True, False]
    assert ["TP1]" in log.read_text() for log in logs] == [False, True]
