"""status, cancel and doctor against a real Slurm, with small scripts; `tests/slurm/test_slurm_cli.py` runs roles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from helpers.run_files import make_run
from helpers.slurm_fixture import open_directory, submit, until, wait_for

from hpc.cancel import cancel
from hpc.sandbox import Sandbox
from hpc.slurm.client import SlurmClient
from hpc.slurm.states import JobState
from hpc.status import RunStatus, status
from rltrain.run.layout import RunLayout

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
# A supervisor's manners: asked by SIGINT it saves; killed it does not.
POLITE = "trap 'sleep 0.5; echo saved >> {out}; exit 0' INT\necho ready >> {out}\nsleep 600 & wait $!\n"
HET = "#SBATCH -N1 -p low -w node1\n#SBATCH hetjob\n#SBATCH -N2 -p low -w node[4-5]\n"


@pytest.fixture
def runs() -> Iterator[Path]:
    with open_directory() as path:
        yield path


def record_job(layout: RunLayout, *jobs: str) -> None:
    """What `submit` writes."""
    now = datetime.now(UTC).isoformat()
    entries = [
        {"job_id": job, "components": [], "cluster": None, "layout": "het", "submitted": now} for job in jobs
    ]
    layout.job.write_text(json.dumps(entries))


def started(cluster: Sandbox, layout: RunLayout, head: str = "", *options: str) -> str:
    """Submit a polite job as the run's, and wait until it listens."""
    out = layout.root / "out"
    job = submit(cluster, head + POLITE.format(out=out), *options)
    record_job(layout, job)
    wait_for(cluster, job, JobState.RUNNING)
    until(out.exists, 120, "the batch script")
    return job


def by_name(runs: Path, client: SlurmClient) -> dict[str, RunStatus]:
    return {run.name: run for run in status(runs_dir=runs, client=client)}


def verb(cluster: Sandbox, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **cluster.env}, capture_output=True, text=True, timeout=240
    )


def test_status_of_many_jobs(idle_cluster: Sandbox, runs: Path) -> None:
    client = SlurmClient(idle_cluster.env)
    for name in ("het", "waiting", "gone", "unknown"):
        make_run(runs, name)
    started(idle_cluster, RunLayout(runs / "het"), HET)
    record_job(
        RunLayout(runs / "waiting"),
        submit(idle_cluster, "sleep 1", "-p", "low", "-w", "node1", "--exclusive"),
    )
    gone = submit(idle_cluster, "exit 3", "-w", "node2")
    record_job(RunLayout(runs / "gone"), gone)
    record_job(RunLayout(runs / "unknown"), "999999")
    wait_for(idle_cluster, gone)

    found = by_name(runs, client)
    assert {name: run.state for name, run in found.items()} == {
        "het": "RUNNING", "waiting": "PENDING", "gone": "FAILED", "unknown": "submitted",
    }  # fmt: skip
    assert [name for name, run in found.items() if run.is_active] == ["het", "waiting"]

    def is_explained() -> bool:
        run = by_name(runs, client)["waiting"]
        return run.expected_start is not None and run.reason in ("Resources", "Priority")

    until(is_explained, 120, "the scheduler's reason and guess")
    done = verb(idle_cluster, "hpc.status", "--runs-dir", runs)
    assert (done.returncode, done.stderr) == (0, "")
    [line] = [line for line in done.stdout.splitlines() if line.startswith("waiting")]
    assert " in " in line and "PENDING" in line


def test_gpu_hours_over_attempts(idle_cluster: Sandbox, runs: Path) -> None:
    layout = make_run(runs, "x")
    job = started(idle_cluster, layout, "", "--gpus-per-node=4", "-w", "node1", "--requeue")
    client = SlurmClient(idle_cluster.env)
    until(lambda: client.squeue([job])[0].elapsed_s >= 2, 120, "two seconds")
    idle_cluster.run("scontrol", "requeuehold", job)  # else it is pending for five seconds
    wait_for(idle_cluster, job, JobState.PENDING)
    [run] = status(runs_dir=runs, client=client)
    assert run.state == "PENDING"

    def hours() -> float:
        return status(runs_dir=runs, client=client)[0].gpu_hours or 0.0

    until(lambda: hours() >= 2 * 4 / 3600, 120, "slurmdbd to hear of the first attempt")
    assert hours() < 60 * 4 / 3600


@pytest.mark.parametrize("head", ["#SBATCH -N1\n", HET], ids=["plain", "het"])
def test_cancel_lets_a_running_job_save(idle_cluster: Sandbox, runs: Path, head: str) -> None:
    layout = make_run(runs, "x")
    running = started(idle_cluster, layout, head)
    spare = submit(idle_cluster, "sleep 600", f"--dependency=afterany:{running}")
    record_job(layout, running, spare)
    message = cancel(layout.root, client=SlurmClient(idle_cluster.env))
    assert f"jobs {spare}, {running}" in message
    assert wait_for(idle_cluster, running).state is JobState.COMPLETED
    assert wait_for(idle_cluster, spare).state is JobState.CANCELLED
    assert (layout.root / "out").read_text().split() == ["ready", "saved"]


@pytest.mark.parametrize("head", ["#SBATCH -N1\n", HET], ids=["plain", "het"])
def test_cancel_now_does_not_wait(idle_cluster: Sandbox, runs: Path, head: str) -> None:
    layout = make_run(runs, "x")
    job = started(idle_cluster, layout, head)
    done = verb(idle_cluster, "hpc.cancel", "x", "--now", "--runs-dir", runs)
    assert (done.returncode, done.stderr) == (0, "")
    assert wait_for(idle_cluster, job).state is JobState.CANCELLED
    assert (layout.root / "out").read_text().split() == ["ready"]
    again = verb(idle_cluster, "hpc.cancel", "x", "--runs-dir", runs)
    assert again.returncode == 2 and "is not running" in again.stderr


def test_doctor_asks_the_nodes(idle_cluster: Sandbox, runs: Path) -> None:
    words = ("--partition", "gpu", "--nodes", "2", "--runs-dir", runs / "new", "--probe-nodes", "--json")
    done = verb(idle_cluster, "hpc.doctor", *words)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["slurm"]["level"] == "ok"
    assert "3 × (4 h100, 16 CPUs" in checks["partition"]["message"]
    assert (
        checks["shared directory"]["level"] == "ok"
        and "is seen from node" in checks["shared directory"]["message"]
    )
    assert checks["packages on nodes"]["level"] == "ok"
    assert list(runs.iterdir()) == []  # the mark is gone


def test_doctor_plans_the_job(
    idle_cluster: Sandbox, runs: Path, tiny_tokenizer: Path, prompt_file: Path
) -> None:
    flags = (
        f"--partition=gpu --runs-dir={runs} --hf-checkpoint={tiny_tokenizer} --random-init --prompt-data={prompt_file}"
        " --label-key=label --rm-type=exact --num-rollout=2 --rollout-batch-size=8 --save-interval=1 --json"
    )
    done = verb(idle_cluster, "hpc.doctor", *flags.split(), "--nodes=4")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert "2 for training (4 ranks each), 2 for rollout (4 engines each)" in checks["plan"]["message"]
    assert checks["flags"]["message"].startswith("8 prompts")
    assert "of 36.0 GiB usable on a GPU of type a100 (40 GiB)" in checks["trainer memory"]["message"]
    assert checks["sbatch --test-only"]["level"] == "ok"
    impossible = verb(
        idle_cluster, "hpc.doctor", *flags.split(), "--nodes=4", "--time=30-0", "--account=nobody"
    )
    assert impossible.returncode == 1
    refused = verb(idle_cluster, "hpc.doctor", "--partition", "gpu", "--nodes", "7")
    assert refused.returncode == 1 and "at most --nodes 6" in refused.stdout


def test_doctor_when_all_nodes_are_busy(
    idle_cluster: Sandbox, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc.doctor import probe

    monkeypatch.setattr(probe, "_QUEUE_SECONDS", 1)
    job = submit(idle_cluster, "sleep 600", "-p", "high", "-w", "node[1-6]", "-N6", "--exclusive")
    wait_for(idle_cluster, job, JobState.RUNNING)
    [check] = probe.probe_nodes(SlurmClient(idle_cluster.env), runs, "gpu", 2)
    assert check.level == "fail" and "busy" in check.advice
    assert list(runs.iterdir()) == []
