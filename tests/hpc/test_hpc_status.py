"""Status of runs, with and without Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from helpers.run_files import EPOCH, NOW, Slurm, make_run, sacct_row, squeue_row, submitted_to_slurm

from hpc import status
from hpc.cli import plain_table
from hpc.runs.lock import hold_lock
from hpc.slurm.client import SlurmClient, SlurmUnavailableError
from hpc.slurm.parse import parse_sacct, parse_squeue
from rltrain.run.layout import RunLayout


def one(runs: Path, client: SlurmClient | None = None) -> status.RunStatus:
    [run] = status.status(runs_dir=runs, client=client)
    return run


def test_fixture_rows_are_as_slurm_prints_them() -> None:
    [record] = parse_sacct(sacct_row("28+1", "RUNNING") + "\n")
    assert (record.key.job, record.key.component, record.nodes) == ("28", 1, ("n1",))
    [record] = parse_squeue(squeue_row("28", "PENDING", Start=EPOCH) + "\n")
    assert record.expected_start == NOW


def test_without_slurm_the_files_speak(tmp_path: Path) -> None:
    layout = make_run(tmp_path, "x", phase="training", steps=3, attempts=1)
    with hold_lock(layout):
        run = one(tmp_path, SlurmClient({"PATH": "/nowhere"}))  # no jobs: Slurm is not even looked for
    assert (run.state, run.phase, run.step, run.num_rollout, run.reward) == (
        "running",
        "training",
        3,
        10,
        0.2,
    )
    assert run.is_active and run.gpu_hours is None and run.job_id is None
    assert one(tmp_path).state == "lost"


def test_many_runs_cost_one_sacct_and_one_squeue(tmp_path: Path) -> None:
    for i in range(20):
        submitted_to_slurm(make_run(tmp_path, f"r{i}"), str(100 + i))
    client = Slurm(squeue=[squeue_row(str(100 + i), "PENDING", Reason="Priority") for i in range(20)])
    runs = status.status(runs_dir=tmp_path, client=client)
    assert sorted(call[0] for call in client.calls) == ["sacct", "squeue"]
    assert {(run.state, run.reason, run.is_active) for run in runs} == {("PENDING", "Priority", True)}


def test_requeued_het_job(tmp_path: Path) -> None:
    """The controller has the last word, all components count, and every attempt has cost GPU-hours."""
    submitted_to_slurm(make_run(tmp_path, "x", phase="stopped", steps=2, attempts=1), "28")
    gpus = {"AllocTRES": "gres/gpu=4", "ElapsedRaw": 1800}
    client = Slurm(
        sacct=[
            sacct_row("28+0", "PREEMPTED", DBIndex=1, **gpus),
            sacct_row("28+1", "PREEMPTED", DBIndex=2, **gpus),
            sacct_row("28+0", "PENDING", DBIndex=6, NodeList="None assigned"),
        ],
        squeue=[
            squeue_row("28+0", "PENDING", Reason="BeginTime", Start=EPOCH + 60),
            squeue_row("28+1", "PENDING", Reason="BeginTime", Start=EPOCH + 120),
        ],
    )
    run = one(tmp_path, client)
    assert (run.state, run.reason, run.gpu_hours) == ("PENDING", "BeginTime", 4.0)
    assert run.expected_start == NOW + timedelta(seconds=120)


def test_a_job_that_ended_by_itself_is_as_the_run_says(tmp_path: Path) -> None:
    submitted_to_slurm(make_run(tmp_path, "x", phase="finished", steps=10, attempts=1), "28")
    run = one(tmp_path, Slurm(sacct=[sacct_row("28", "COMPLETED")]))
    assert (run.state, run.slurm_state, run.is_active) == ("finished", "COMPLETED", False)
    out_of_time = Slurm(sacct=[sacct_row("28", "TIMEOUT")])
    assert one(tmp_path, out_of_time).state == "finished"  # it was done before
    RunLayout(tmp_path / "x").status.write_text('{"phase": "stopped"}')
    assert one(tmp_path, out_of_time).state == "TIMEOUT"


def test_a_chain_of_jobs_is_as_its_first_living_one(tmp_path: Path) -> None:
    layout = submitted_to_slurm(make_run(tmp_path, "x", phase="training", attempts=2), "27", "28", "29", "30")
    waiting = [squeue_row(job, "PENDING", Reason="Dependency") for job in ("29", "30")]
    client = Slurm(sacct=[sacct_row("27", "TIMEOUT")], squeue=[squeue_row("28", "RUNNING"), *waiting])
    run = one(tmp_path, client)
    assert (run.state, run.job_id, run.spare_jobs, run.reason) == ("RUNNING", "28", 2, None)
    assert status.row(run, NOW)[7] == "28 +2"
    layout.status.write_text('{"phase": "finished"}')
    layout.metrics.write_text('{"step": 9}\n')
    over = Slurm(sacct=[sacct_row("28", "COMPLETED"), sacct_row("30", "CANCELLED")])
    assert one(tmp_path, over).state == "finished"


def test_later_start_on_this_machine(tmp_path: Path) -> None:
    layout = submitted_to_slurm(make_run(tmp_path, "x", phase="finished", steps=10, attempts=2), "28")
    jobs = json.loads(layout.job.read_text())
    layout.job.write_text(json.dumps([*jobs, {"job_id": "local", "layout": "local"}]))
    assert one(tmp_path, Slurm(sacct=[sacct_row("28", "PREEMPTED")])).state == "finished"


def test_an_id_of_another_time_or_another_cluster_is_not_ours(tmp_path: Path) -> None:
    submitted_to_slurm(make_run(tmp_path, "x", phase="stopped", attempts=1), "28")
    old = sacct_row("28", "FAILED", Submit=EPOCH - 86400)
    assert one(tmp_path, Slurm(sacct=[old])).state == "stopped"
    client = Slurm(squeue=[squeue_row("28", "RUNNING")])
    submitted_to_slurm(RunLayout(tmp_path / "x"), "28", cluster="other")
    assert one(tmp_path, client).state == "stopped"
    assert client.calls == []


def test_without_accounting_squeue_is_enough(tmp_path: Path) -> None:
    submitted_to_slurm(make_run(tmp_path, "x"), "28")
    run = one(tmp_path, Slurm(squeue=[squeue_row("28", "RUNNING", NodeList="n1")], accounting=False))
    assert (run.state, run.gpu_hours) == ("RUNNING", None)


def test_slurm_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted_to_slurm(make_run(tmp_path, "x", phase="training", steps=3, attempts=1), "28")
    client = Slurm()

    def run(*command: str, stdin: str | None = None) -> str:
        raise SlurmUnavailableError("squeue gave no answer")

    monkeypatch.setattr(client, "run", run)
    [found], problem = status.look([], tmp_path, client)
    assert problem == "squeue gave no answer"
    assert (found.state, found.step) == ("unknown", 3)  # not "lost": it may well run on a node


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "now"), (20, "now"), (420, "in 7 min"), (7500, "in 2:05 h"), (200000, "in 55:33 h")],
)
def test_eta(seconds: int, text: str) -> None:
    assert status.describe_eta(NOW + timedelta(seconds=seconds), NOW) == text


def test_plain_columns_line_up() -> None:
    assert plain_table(["run", "state"], [("a-long-name", "x"), ("b", "running")]).splitlines() == [
        "RUN          STATE",
        "a-long-name  x",
        "b            running",
    ]


def status_cli(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc.status", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PATH": "/nowhere"})


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    submitted_to_slurm(make_run(tmp_path, "x", phase="stopped", steps=3, attempts=2), "28")
    done = status_cli("--runs-dir", tmp_path)
    assert done.returncode == 0
    assert [line.split()[:5] for line in done.stdout.splitlines()] == [
        ["RUN", "STATE", "STEP", "REWARD", "ATTEMPTS"],
        ["x", "stopped", "3/10", "0.200", "2"],
    ]
    assert "Slurm could not be asked" in done.stderr and "not on PATH" in done.stderr

    missing = status_cli("y", "--runs-dir", tmp_path)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: there is no run 'y'")
    assert status.main(["x", "--json", "--runs-dir", str(tmp_path)]) == 0
    [run] = json.loads(capsys.readouterr().out)
    assert (run["name"], run["step"], run["is_active"]) == ("x", 3, False)
    assert status.main(["--runs-dir", str(tmp_path / "empty")]) == 0
    assert "python -m hpc.submit" in capsys.readouterr().out


def test_a_notebook_gets_a_table(tmp_path: Path) -> None:
    import pandas as pd

    make_run(tmp_path, "x", phase="finished", steps=10, attempts=1)
    table = pd.DataFrame(status.status(runs_dir=tmp_path))
    assert table[["name", "state", "step"]].values.tolist() == [["x", "finished", 10]]


def test_a_held_job_does_not_start_now(tmp_path: Path) -> None:
    submitted_to_slurm(make_run(tmp_path, "x"), "28")
    run = one(tmp_path, Slurm(squeue=[squeue_row("28", "PENDING", Reason="JobHeldUser", Start=EPOCH)]))
    assert run.expected_start is None
    assert run.reason == "JobHeldUser: `scontrol release 28` lets it start"


def test_what_the_database_has_forgotten_has_no_gpu_hours(tmp_path: Path) -> None:
    submitted_to_slurm(make_run(tmp_path, "x", phase="finished", steps=2, attempts=1), "28")
    assert one(tmp_path, Slurm()).gpu_hours is None
