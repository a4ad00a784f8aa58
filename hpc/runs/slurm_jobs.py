"""Slurm's records of the jobs of many runs, read in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from hpc.runs.find import Submission
from hpc.slurm.client import SlurmClient, SlurmError
from hpc.slurm.records import JobRecord
from hpc.slurm.states import JobState, combined

# The clocks of the node that submits and of Slurm may differ by so much: munge refuses more.
_CLOCK_SLACK = timedelta(minutes=5)


@dataclass(frozen=True)
class SlurmView:
    """Slurm's records of some jobs.

    Attributes:
        records: every attempt of every component, by the job's id.
        has_accounting: whether GPU-hours can be worked out.
        problem: why Slurm could not be asked, if it could not.
    """

    records: Mapping[str, Sequence[JobRecord]] = dataclasses.field(default_factory=dict)
    has_accounting: bool = False
    problem: str | None = None


def ask_slurm(jobs: Sequence[Submission], client: SlurmClient | None = None) -> SlurmView:
    """Slurm's records of all these jobs, by one sacct and one squeue; by neither if there are no jobs."""
    if not jobs:
        return SlurmView()
    client = client or SlurmClient()
    try:
        own = [job for job in jobs if job.cluster in (None, client.config.get("ClusterName"))]
        ids = list(dict.fromkeys(job.job_id for job in own))
        waiting = client.squeue(ids)
        past = client.sacct(ids, _since(own), every_attempt=True) if client.has_accounting else []
    except SlurmError as error:
        return SlurmView(problem=str(error))
    return SlurmView(_by_job(own, past, waiting), client.has_accounting)


def _since(jobs: Iterable[Submission]) -> datetime | None:
    times = [job.submitted for job in jobs]
    known = [time for time in times if time is not None]
    return min(known) - _CLOCK_SLACK if known and len(known) == len(times) else None


def _by_job(
    jobs: Sequence[Submission], past: Iterable[JobRecord], current: Iterable[JobRecord]
) -> dict[str, list[JobRecord]]:
    """Records by job, the newest last. The controller knows an attempt before the database does, so it has the last
    word; records of another job that once had the same id are left out."""
    known = {job.job_id: job for job in jobs}
    found: dict[str, list[JobRecord]] = {}
    for record in [*sorted(past, key=lambda record: record.db_index or 0), *current]:
        job = known.get(record.key.job)
        if job and not _is_older(record, job):
            found.setdefault(record.key.job, []).append(record)
    return found


def _is_older(record: JobRecord, job: Submission) -> bool:
    return bool(job.submitted and record.submitted and record.submitted < job.submitted - _CLOCK_SLACK)


def newest_attempt(records: Sequence[JobRecord]) -> list[JobRecord]:
    """Of a job's records, newest last, each component's last one."""
    return list({record.key.component: record for record in records}.values())


def job_state(records: Sequence[JobRecord]) -> JobState | None:
    """State of a job from its records, newest last; None if Slurm has forgotten it."""
    return combined(record.state for record in newest_attempt(records)) if records else None


def is_alive(job: Submission, slurm: SlurmView) -> bool:
    """Whether a job runs or waits."""
    state = job_state(slurm.records.get(job.job_id, ()))
    return state is not None and not state.is_final
