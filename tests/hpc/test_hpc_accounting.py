"""The table of a run's attempts, from records that a real sacct printed."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest

from hpc.accounting import COLUMNS, SubmittedJob, submitted_jobs, to_frame
from hpc.slurm import parse
from hpc.slurm.records import JobRecord
from hpc.slurm.states import JobState
from rltrain.run.errors import UserError
from rltrain.run.files import append_event


@pytest.fixture(scope="module")
def records() -> list[JobRecord]:
    return parse.parse_sacct((Path(__file__).parents[1] / "slurm_outputs" / "sacct.txt").read_text())


def test_preempted_run(records: list[JobRecord]) -> None:
    table = to_frame(records, [SubmittedJob("7", roles=("rollout", "trainer"))])
    assert list(table.columns) == list(COLUMNS)
    assert table[["role", "component", "attempt", "state"]].values.tolist() == [
        ["rollout", 0, 0, "PREEMPTED"],
        ["trainer", 1, 0, "PREEMPTED"],
        ["rollout", 0, 1, "COMPLETED"],
        ["trainer", 1, 1, "COMPLETED"],
    ]
    first, second = (table[table.role == "trainer"].iloc[i] for i in (0, 1))
    assert (first.reason, first.gpus, first.num_nodes, first.nodes) == (
        "made way for another job",
        8,
        2,
        ["node4", "node5"],
    )
    assert first.elapsed_s >= 2 and first.gpu_hours == 8 * first.elapsed_s / 3600
    assert (
        second.submitted == first.ended
        and second.wait_s == (second.started - first.ended).total_seconds() >= 5
    )
    assert str(table.started.dtype) == "datetime64[us, UTC]"


def test_a_second_job_continues_the_count(records: list[JobRecord]) -> None:
    table = to_frame(records, [SubmittedJob("3"), SubmittedJob("6"), SubmittedJob("12")])
    assert table[["job_id", "attempt", "reason"]].values.tolist() == [
        ["3", 0, "exit code 3"],
        ["6", 1, "cancelled"],  # in the queue: it never became attempt 1 …
        ["12", 1, "a node failed"],  # … this one did
    ]
    assert pd.isna(table.started[1]) and pd.isna(table.wait_s[1]) and table.gpu_hours[1] == 0


def test_an_attempt_whose_start_the_database_does_not_know_yet_counts(records: list[JobRecord]) -> None:
    late = [
        replace(record, started=None) if record.state is JobState.PREEMPTED else record for record in records
    ]
    table = to_frame(late, [SubmittedJob("7")])
    assert table.attempt.tolist() == [0, 0, 1, 1]


def test_waiting_again(records: list[JobRecord]) -> None:
    waiting = to_frame(records, [SubmittedJob("13")]).iloc[-1]
    assert (waiting.attempt, waiting.state, waiting.reason, waiting.gpus) == (1, "PENDING", "BeginTime", 0)
    assert pd.isna(waiting.exit_code) and pd.isna(waiting.ended)


def test_an_id_used_twice(records: list[JobRecord]) -> None:
    """Only the job that was submitted when the run says so is the run's."""
    [record] = [record for record in records if record.key.job == "3"]
    assert record.submitted
    older = replace(record, submitted=record.submitted - timedelta(days=400), db_index=0)
    submitted = record.submitted + timedelta(seconds=1)
    table = to_frame([older, record], [SubmittedJob("3", submitted)])
    assert table.submitted.tolist() == [record.submitted]


def test_jobs_of_a_run(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    append_event(events, 0, "run_submitted", {"resumed": False})
    append_event(events, 0, "job_submitted", {"job_id": 28, "components": ["trainer", "rollout"]})
    append_event(events, 1, "attempt_started", {"job_id": "28"})
    append_event(events, 1, "job_submitted", {"job_id": "31"})
    with events.open("a") as file:
        file.write('{"time": 1, "job_')  # a line that is being written
    jobs = submitted_jobs(tmp_path)
    assert [(job.job, job.roles) for job in jobs] == [("28", ("trainer", "rollout")), ("31", ())]
    assert jobs[0].submitted and jobs[1].submitted and jobs[0].submitted <= jobs[1].submitted


def test_runs_without_jobs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        submitted_jobs(tmp_path)
    append_event(tmp_path / "events.jsonl", 0, "run_submitted", {})
    with pytest.raises(UserError, match="not been submitted to Slurm"):
        submitted_jobs(tmp_path)
