"""The state of a run, from its files and from Slurm; and whether it has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hpc.runs.find import RunRecord, choose_runs, read_run
from hpc.runs.lock import find_holder
from hpc.runs.slurm_jobs import SlurmView, ask_slurm, is_alive, job_state, newest_attempt
from hpc.slurm.client import SlurmClient
from hpc.slurm.records import JobRecord
from hpc.slurm.states import JobState
from rltrain.run.layout import RunLayout

_SLURM_SECONDS = 10.0  # between two questions to Slurm
_PATIENCE_SECONDS = 10.0  # for a start: until its supervisor holds the lock


@dataclass(frozen=True)
class RunStatus:
    """One run at one moment; `pandas.DataFrame(status())` is a table of them.

    Attributes:
        state: Slurm's word while a job waits or runs or if it did not end by itself (`PENDING`, `RUNNING`,
            `PREEMPTED`, `TIMEOUT`, …); else what the run's files say: `running`, `finished`, `stopped`, `failed`,
            `lost`, `submitted`, `not submitted`; `unknown` if Slurm could not be asked.
        slurm_state: Slurm's word for the job `job_id`, None without one or if Slurm has forgotten it.
        reason: why it waits, or ended so.
        expected_start: Slurm's guess for a job that waits.
        phase: what the run does, or did last.
        step, num_rollout: steps done and asked for.
        reward: mean reward of the last step.
        attempts: how many have begun.
        gpu_hours: of all its Slurm jobs and attempts; None where sacct does not know.
        job_id: of the Slurm job that runs or is the next to, else of the newest.
        spare_jobs: how many more are waiting.
    """

    name: str
    state: str
    slurm_state: str | None
    reason: str | None
    expected_start: datetime | None
    phase: str | None
    step: int
    num_rollout: int | None
    reward: float | None
    attempts: int
    gpu_hours: float | None
    job_id: str | None
    spare_jobs: int
    run_dir: Path

    @property
    def is_active(self) -> bool:
        """True while the run is running or waits for its turn."""
        if self.slurm_state is not None and not JobState(self.slurm_state).is_final:
            return True
        return self.state == "running"


def look(
    runs: Sequence[str | Path], runs_dir: Path, client: SlurmClient | None = None
) -> tuple[list[RunStatus], str | None]:
    """`status`, and why Slurm could not be asked (None if it could, or had not to be)."""
    records = [read_run(layout) for layout in choose_runs(runs, runs_dir)]
    slurm = ask_slurm([job for record in records for job in record.slurm_jobs], client)
    return [to_status(record, slurm) for record in records], slurm.problem


def to_status(record: RunRecord, slurm: SlurmView) -> RunStatus:
    """Status of one run from its files and what Slurm knows."""
    alive = [job for job in record.slurm_jobs if is_alive(job, slurm)]
    # Of a chain of jobs the first that is alive runs, or is the next to; spare ones wait for it.
    job = alive[0] if alive else record.slurm_jobs[-1] if record.slurm_jobs else None
    current = newest_attempt(slurm.records.get(job.job_id, ())) if job else []
    state = job_state(current)
    return RunStatus(
        name=record.layout.name,
        state=_state(record, state, slurm.problem),
        slurm_state=state.value if state else None,
        reason=_reason(record, state, current),
        expected_start=_expected_start(current),
        phase=record.phase,
        step=record.step,
        num_rollout=record.num_rollout,
        reward=record.reward,
        attempts=record.attempts,
        gpu_hours=_gpu_hours(record, slurm),
        job_id=job.job_id if job else None,
        spare_jobs=max(0, len(alive) - 1),
        run_dir=record.layout.root,
    )


def _state(record: RunRecord, state: JobState | None, problem: str | None) -> str:
    if state is not None and not _files_know_better(record, state):
        return state.value
    silent = record.state in ("lost", "submitted") and not record.was_last_local
    return "unknown" if problem and silent else record.state


def _files_know_better(record: RunRecord, state: JobState) -> bool:
    """A job that ended by itself is in the state of the run's files; Slurm does not know what followed here."""
    if not state.is_final:
        return False
    done = record.state == "finished"
    # A stopped run's job exits with 75, so that no job that waits for it to end well begins.
    stopped = record.state == "stopped" and state is JobState.FAILED
    return (
        state is JobState.COMPLETED or stopped or done or record.state == "running" or record.was_last_local
    )


def _reason(record: RunRecord, state: JobState | None, current: Sequence[JobRecord]) -> str | None:
    if state is None or _files_know_better(record, state):
        return record.reason
    said = next((each.reason for each in current if each.reason), None)
    if state is JobState.FAILED:  # Slurm only knows the exit code
        return record.reason or said
    if held := next((each for each in current if _is_held(each)), None):
        return f"{held.reason}: `scontrol release {held.key.job}` lets it start"
    return said or (record.reason if state.is_final else None)


def _is_held(job: JobRecord) -> bool:
    return job.state.is_waiting and (job.reason or "").startswith("JobHeld")


def _expected_start(current: Sequence[JobRecord]) -> datetime | None:
    if any(_is_held(each) for each in current):  # Slurm says "now" of it
        return None
    # The components of a job start together: when the last of them can.
    return max((each.expected_start for each in current if each.expected_start), default=None)


def _gpu_hours(record: RunRecord, slurm: SlurmView) -> float | None:
    if not record.slurm_jobs or not slurm.has_accounting:
        return None
    all_records = [each for job in record.slurm_jobs for each in slurm.records.get(job.job_id, ())]
    if not all_records:  # the database has forgotten them
        return None
    return sum((each.gpus or 0) * each.elapsed_s for each in all_records) / 3600


class RunEnd:
    """Tells whether a run has ended; a job that was requeued or waits in the queue has not."""

    def __init__(self, layout: RunLayout, client: SlurmClient | None = None) -> None:
        self._layout, self._client = layout, client
        self._next_question = 0.0
        self._active_in_slurm = False
        self._free_since = time.monotonic()

    def is_over(self, attempt: int | None = None) -> bool:
        """Whether the run has ended or, if an `attempt` is given, that one has."""
        if attempt is not None and max(self._layout.attempts(), default=attempt) > attempt:
            return True
        if find_holder(self._layout) is not None:
            self._free_since = time.monotonic()
            return False
        if self._is_active_in_slurm():
            return False
        record = read_run(self._layout)
        has_ended = record.state in ("finished", "stopped", "failed")
        return has_ended or time.monotonic() - self._free_since > _PATIENCE_SECONDS

    def _is_active_in_slurm(self) -> bool:
        if time.monotonic() >= self._next_question:
            self._next_question = time.monotonic() + _SLURM_SECONDS
            record = read_run(self._layout)
            slurm = ask_slurm(record.slurm_jobs, self._client)
            # Unknown is not over: Slurm may answer again in a minute.
            self._active_in_slurm = bool(slurm.problem) or to_status(record, slurm).is_active
        return self._active_in_slurm
