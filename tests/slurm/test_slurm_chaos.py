"""Storms on a real Slurm: whatever happens to a run, nothing is lost, done twice, or left behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.slurm_fixture import need_slurm, open_directory

from hpc.chaos.faults import draw, parse
from hpc.chaos.storm import Storm
from hpc.sandbox import ClusterSpec, Sandbox
from rltrain.run.files import read_lines
from rltrain.run.layout import RunLayout

pytestmark = [pytest.mark.slurm, pytest.mark.chaos]
STEPS = 40
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Sandbox]:
    need_slurm()
    spec = ClusterSpec(nodes=4, cpu_nodes=0, gpus=1)
    with open_directory() as path, Sandbox(path, spec, owner_pid=os.getpid()) as up:
        yield up


@pytest.mark.learning
@pytest.mark.parametrize("seed", range(1, 4))
def test_nothing_is_lost_in_a_storm(cluster: Sandbox, seed: int) -> None:
    outcome = Storm(cluster, cluster.directory / "runs", f"storm-{seed}", STEPS).run(draw(seed, 6, STEPS))
    assert outcome.problems == (), " ".join(map(str, outcome.faults))


def test_a_controller_that_restarts_or_fails_over_and_a_supervisor_that_is_killed_lose_no_job() -> None:
    """With its supervisor the job had failed, and stayed so until a person resubmitted the run."""
    need_slurm()
    faults = parse(["restart-controller@5", "requeue@10", "restart-controller@10+0.3", "refuse-step:engine-0@15~2",
                    "freeze-supervisor@20~1", "kill-supervisor@25", "fail-over@30~1"])  # fmt: skip
    spec = ClusterSpec(nodes=4, cpu_nodes=0, gpus=1, backup=True)
    with open_directory() as path, Sandbox(path, spec, owner_pid=os.getpid()) as own:
        storm = Storm(own, path / "runs", "restarts", STEPS)
        outcome = storm.run(faults)
        events = read_lines(RunLayout(storm.run_dir).events)
    assert (outcome.problems, outcome.done, outcome.hands) == ((), 7, 0)
    ends = [event for event in events if event["kind"] == "attempt_finished"]
    assert [each["cause"] for each in ends if each["reason"] == "the supervisor was killed by SIGKILL"] == [
        "unknown"
    ]


def test_a_run_gets_over_faults_of_disk_network_names_and_clocks() -> None:
    """On a disk that was full, srun's word of a rank's end was lost, and the others waited a minute for it."""
    need_slurm()
    faults = ["cut-off:node2@3~1", "lose-names@5~3", "fill-disk@7~1", "lock-checkpoints@13~0.7"]
    faults += ["stall-disk@9~1.5", "slow-disk@15~2"]
    if shutil.which("gcc"):
        faults += ["clock-ahead:node1@10~1.2", "clock-behind:node1@11~1.2"]
    command = [sys.executable, "-m", "hpc.chaos", "--steps=18", "--repeat", *faults]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1000)
    if "takes root" in done.stdout:
        pytest.skip("networks and disks of one's own take root")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(faults)} of {len(faults)} faults met somebody" in done.stdout
    assert re.search(r"^fill-disk +1 ", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.learning
def test_a_storm_over_real_roles_loses_no_sample(
    cluster: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its samples are those of a run that nothing happened to, token by token, and W&B has one run."""
    data, runs = tmp_path_factory.mktemp("demo") / "files", cluster.directory / "runs"
    subprocess.run([sys.executable, "-m", "rltrain.demo.assets", str(data)], check=True)
    assert Storm(cluster, runs, "calm", 12, nodes=3, real=data).run(()).problems == ()
    faults = parse(["kill:rollout-0@2", "kill:engine-0@4", "requeue@7+0.2"])
    storm = Storm(cluster, runs, "real", 12, nodes=3, real=data, undisturbed=runs / "calm")
    outcome = storm.run(faults)
    assert (outcome.problems, outcome.done) == ((), 3)
    assert outcome.kept is not None and outcome.kept.samples > 0


def test_a_job_that_needs_every_node_goes_on_though_one_failed_twice(cluster: Sandbox) -> None:
    """It waited for ever: a node that fails twice in a day is excluded, and the partition had no other."""
    faults = parse(["power-off:node1@5~1", "power-off:node1@15~1"])
    outcome = Storm(cluster, cluster.directory / "runs", "twice", STEPS, timeout=300).run(faults)
    assert (outcome.problems, outcome.done) == ((), 2)
