"""How runs are: state, reason, queue ETA, step, reward, attempts, GPU-hours.

All runs of the runs directory, or those named. Slurm is asked once for all of them together (one sacct, one
squeue); without Slurm the table says what the runs' own files say.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hpc import cli
from hpc.run_jobs import SlurmView, ask_slurm, is_alive, job_state, newest_attempt
from hpc.runs import RunRecord, choose_runs, read_run
from hpc.slurm.client import SlurmClient
from hpc.slurm.records import JobRecord
from hpc.slurm.states import JobState

EXAMPLE = "python -m hpc.status demo          # python -m hpc.status --json | jq '.[] | .name'"
COLUMNS = ("run", "state", "step", "reward", "attempts", "gpu-hours", "eta", "job", "reason")

_STYLES = {
    **dict.fromkeys(("running", "RUNNING", "finished"), "green"),
    **dict.fromkeys(("submitted", "stopped", "PENDING", "CONFIGURING", "COMPLETING"), "yellow"),
    **dict.fromkeys(
        ("failed", "lost", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "CANCELLED"), "red"
    ),
}


@dataclass(frozen=True)
class RunStatus:
    """One run at one moment; `pandas.DataFrame(status())` is a table of them.

    Attributes:
        state: Slurm's word while a job waits or runs or if it did not end by itself (`PENDING`, `RUNNING`,
            `PREEMPTED`, `TIMEOUT`, …); else what the run's files say: `running`, `finished`, `stopped`, `failed`,
            `lost`, `submitted`; `unknown` if Slurm could not be asked.
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
        """Whether it runs, or waits for its turn."""
        if self.slurm_state is not None and not JobState(self.slurm_state).is_final:
            return True
        return self.state == "running"


def status(
    runs: Sequence[str | Path] = (), runs_dir: str | Path = "runs", client: SlurmClient | None = None
) -> list[RunStatus]:
    """The status of these runs (names or directories; none: all in `runs_dir`), the one that changed last at the end.

    Raises:
        UserError: there is no such run.
    """
    return look(runs, Path(runs_dir), client)[0]


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
    """A job that ended by itself is as the run says; what happened on this machine later is no matter of Slurm's."""
    if not state.is_final:
        return False
    done = record.state == "finished" and record.step >= (record.num_rollout or 0)
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
    return said or (record.reason if state.is_final else None)


def _expected_start(current: Sequence[JobRecord]) -> datetime | None:
    # The components of a job start together: when the last of them can.
    return max((each.expected_start for each in current if each.expected_start), default=None)


def _gpu_hours(record: RunRecord, slurm: SlurmView) -> float | None:
    if not record.slurm_jobs or not slurm.has_accounting:
        return None
    all_records = (each for job in record.slurm_jobs for each in slurm.records.get(job.job_id, ()))
    return sum((each.gpus or 0) * each.elapsed_s for each in all_records) / 3600


def row(run: RunStatus, now: datetime) -> tuple[str, ...]:
    """The cells of a run's line in the table."""
    return (
        run.name,
        run.state,
        f"{run.step}/{'?' if run.num_rollout is None else run.num_rollout}",
        "-" if run.reward is None else f"{run.reward:.3f}",
        str(run.attempts),
        "-" if run.gpu_hours is None else f"{run.gpu_hours:.2f}",
        "-" if run.expected_start is None else describe_eta(run.expected_start, now),
        (run.job_id or "-") + (f" +{run.spare_jobs}" if run.spare_jobs else ""),
        shorten(run.reason or "-"),
    )


def describe_eta(start: datetime, now: datetime) -> str:
    """When a job may start, seen from now: `in 2:05 h`, `in 7 min`, `now`."""
    minutes = round((start - now).total_seconds() / 60)
    if minutes < 1:
        return "now"
    return f"in {minutes} min" if minutes < 60 else f"in {minutes // 60}:{minutes % 60:02d} h"


def shorten(text: str, limit: int = 80) -> str:
    """A text that fits a column."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def main(argv: list[str]) -> int:
    """The command line; returns an exit code."""
    parser = cli.make_parser("hpc.status", __doc__, EXAMPLE)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="name or directory (default: all runs)")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    cli.add_runs_dir(parser)
    args = parser.parse_args(argv)
    found, problem = look(args.runs, args.runs_dir, None)
    if args.json:
        cli.print_json([{**dataclasses.asdict(run), "is_active": run.is_active} for run in found])
    elif not found:
        print(f"there are no runs in {args.runs_dir}. `python -m hpc.submit` starts one.")
    else:
        cli.print_table(COLUMNS, [row(run, datetime.now(UTC)) for run in found], _STYLES)
    if problem:
        print(
            f"warning: Slurm could not be asked, so this is what the runs' files say: {problem}",
            file=sys.stderr,
        )
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
