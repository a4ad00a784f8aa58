"""What an attempt of a job was: from a real Slurm's accounting, and the same from the run's own events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.slurm_fixture import submit, until, wait_for

from analysis import export, load_run, metrics
from analysis.frames.events import ATTEMPT_COLUMNS
from hpc.sandbox import Sandbox
from hpc.slurm.client import SlurmClient
from hpc.slurm.states import JobState
from rltrain.run.files import read_lines
from rltrain.run.layout import RunLayout

# The first start is preempted once it has told its events; the second one finishes.
JOB = r"""
note() { echo "{\"time\": $(date +%s.%N), \"attempt\": ${SLURM_RESTART_COUNT:-0}, \"kind\": \"$1\", $2}" >> EVENTS; }
stop() {
  note stop_requested '"reason": "preempted"'
  note attempt_finished '"state": "stopped", "exit_code": 75'
  exec sleep 600 # who exits now is not requeued
}
note attempt_started "\"host\": \"$SLURMD_NODENAME\""
if [ -z "$SLURM_RESTART_COUNT" ]; then trap stop TERM; sleep 600 & wait; fi
note attempt_finished '"state": "finished", "exit_code": 0'
"""
CONFIG = "[train]\nactor_num_nodes = 1\nactor_num_gpus_per_node = 4\ncolocate = true\nrollout_num_gpus = 4\n"


@pytest.mark.slurm
def test_attempts_of_a_preempted_job(
    idle_cluster: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = RunLayout(tmp_path)
    layout.config.write_text(CONFIG)
    script = JOB.replace("EVENTS", str(layout.events))
    job = submit(
        idle_cluster, script, "-p", "low", "-w", "node5", "--exclusive", "--gpus-per-node=4", "--requeue"
    )
    until(lambda: read_lines(layout.events), 120, "the job to start")
    lines = layout.events.read_text()
    submitted = {"time": json.loads(lines)["time"] - 1, "attempt": 0, "kind": "run_submitted", "job_id": job}
    layout.events.write_text(json.dumps(submitted) + "\n" + lines)
    started = ("sacct", "-D", "-X", "-n", "-P", "-j", job, "-o", "State,Start")
    until(lambda: "RUNNING|20" in idle_cluster.run(*started), 120, "slurmdbd to hear that it started")
    submit(idle_cluster, "true", "-p", "high", "-w", "node5", "--exclusive")
    assert wait_for(idle_cluster, job, JobState.COMPLETED, timeout=120).state is JobState.COMPLETED
    client = SlurmClient(idle_cluster.env)
    until(lambda: client.poll([job])[job].state is JobState.COMPLETED, 120, "slurmdbd to hear of it")

    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, idle_cluster.env[name])
    run = load_run(tmp_path, strict=True)
    accounted, told = run.read_attempts(), run.attempts
    for frame in (accounted, told):
        assert frame.dtypes.astype(str).to_dict() == ATTEMPT_COLUMNS
        assert frame[["job_id", "attempt", "state"]].values.tolist() == [
            [job, 0, "PREEMPTED"], [job, 1, "COMPLETED"]
        ]  # fmt: skip
        assert frame["nodes"].tolist() == [["node5"]] * 2
        assert frame["gpus"].tolist() == [4, 4]
        assert (frame["gpu_hours"] == 4 * frame["elapsed_s"] / 3600).all()
    raw = client.run("sacct", "-D", "-X", "-n", "-P", "-j", job, "-o", "Submit,Eligible,Start,End")
    columns = accounted[["submitted", "eligible", "started", "ended"]]
    seconds = [[int(time.timestamp()) for time in row] for row in columns.itertuples(index=False)]
    assert seconds == [[int(time) for time in line.split("|")] for line in raw.split()]
    waited = (accounted["started"] - accounted["submitted"]).dt.total_seconds()
    assert accounted["wait_s"].tolist() == waited.tolist()
    # Slurm gives whole seconds, and counts what the batch script does not see.
    assert ((accounted["elapsed_s"] - told["elapsed_s"]).abs() < 30).all()
    cost = metrics.cost(run, accounted)
    assert cost["allocated_gpu_hours"] == accounted["gpu_hours"].sum()
    assert cost["queue_wait_s"] == accounted["wait_s"].sum()
    assert export.main([str(tmp_path), "--frame", "attempts", "--sacct", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["state"] for row in rows] == ["PREEMPTED", "COMPLETED"]


def test_without_slurm_the_accounting_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    event = {"time": 1.0, "attempt": 0, "kind": "run_submitted", "job_id": "7"}
    RunLayout(tmp_path).events.write_text(json.dumps(event) + "\n")
    monkeypatch.setattr(SlurmClient, "has_accounting", False)
    assert export.main([str(tmp_path), "--frame", "attempts", "--sacct", "--json"]) == 2
    assert "no accounting" in capsys.readouterr().err
    assert export.main([str(tmp_path), "--frame", "attempts", "--json"]) == 0
