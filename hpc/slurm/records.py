"""Slurm's facts about jobs and nodes: plain data. `parse.py` makes it from text."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from hpc.slurm.states import JobState


@dataclass(frozen=True)
class JobKey:
    """A job id taken apart: `28+1.batch`, `28_3`, `28_[4-7]`.

    Attributes:
        job: what the user knows: `28`, or `28_3` for an array's task.
        component: number of a heterogeneous job's component, None for other jobs.
        step: `batch`, `extern`, `0` …; None for the job itself.
    """

    job: str
    component: int | None = None
    step: str | None = None

    @classmethod
    def parse(cls, text: str) -> JobKey:
        """The inverse of `str`."""
        whole, _, step = text.strip().partition(".")
        job, plus, component = whole.partition("+")
        return cls(job, int(component) if plus else None, step or None)

    def __str__(self) -> str:
        component = "" if self.component is None else f"+{self.component}"
        return f"{self.job}{component}{'.' + self.step if self.step else ''}"


@dataclass(frozen=True)
class JobRecord:
    """One attempt of one component of a job, as sacct or squeue tells it.

    Attributes:
        key: id; `key.component` is None for a job that is not heterogeneous.
        raw_id: the id that Slurm counts by: every component and every array task has its own.
        exit_code, signal: of the batch script; None while it runs, or where squeue has been asked.
        submitted: when the job was submitted, or requeued for this attempt.
        expected_start: Slurm's guess for a waiting job (squeue only).
        elapsed_s: time that it ran.
        time_limit_s: None for no limit.
        nodes: names of the nodes it holds or held.
        gpus: number it holds or held; None where squeue has been asked.
        db_index: grows with every record of the accounting database (sacct only).
    """

    key: JobKey
    raw_id: int
    name: str
    user: str
    account: str
    partition: str
    qos: str
    state: JobState
    reason: str | None
    exit_code: int | None
    signal: int | None
    submitted: datetime | None
    eligible: datetime | None
    expected_start: datetime | None
    started: datetime | None
    ended: datetime | None
    elapsed_s: float
    time_limit_s: float | None
    num_nodes: int
    nodes: tuple[str, ...]
    gpus: int | None
    work_dir: str
    db_index: int | None


@dataclass(frozen=True)
class JobDetail:
    """One component of a job, as the controller knows it (`scontrol show job -o`).

    Attributes:
        restarts: how often it was requeued.
        requeue: whether Slurm may requeue it.
        preempted: since when it is being preempted; None if it is not, and also outside of a grace time.
        ends: when it ends or has ended; for a running job, when its time is up.
        fields: everything Slurm prints, by Slurm's names.
    """

    key: JobKey
    raw_id: int
    state: JobState
    reason: str | None
    restarts: int
    requeue: bool
    exit_code: int | None
    signal: int | None
    preempted: datetime | None
    started: datetime | None
    ends: datetime | None
    nodes: tuple[str, ...]
    fields: dict[str, str]


@dataclass(frozen=True)
class NodeState:
    """A node and what it does: `idle`, `mixed`, `allocated`, `down`, `draining`, …; `*`: it does not answer."""

    name: str
    state: str
    reason: str | None
