"""The cost of a run on Slurm: every attempt of its jobs, with queue wait, time, GPU-hours and end.

In Python: hpc.accounting.attempts("runs/my-run").groupby("role").gpu_hours.sum()
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc import cli
from hpc.runs.find import find_run
from hpc.slurm.client import SlurmClient, SlurmError
from hpc.slurm.nodelist import compress
from hpc.slurm.records import JobRecord
from hpc.slurm.states import JobState
from rltrain.run.errors import UserError
from rltrain.run.files import read_lines
from rltrain.run.layout import RunLayout

if TYPE_CHECKING:
    import pandas as pd

EXAMPLE = "python -m hpc.accounting demo"

# The clocks of the node that submits and of the database may differ by so much: munge refuses more.
_CLOCK_SLACK = timedelta(minutes=5)

# Columns and their pandas types, in order.
COLUMNS = {
    "job_id": "string",  # as sbatch printed it; of a heterogeneous job the leader's
    "component": "Int64",  # number of the heterogeneous job's component, 0 for other jobs
    "role": "string",  # what runs in the component, if the run's events say so
    "attempt": "Int64",  # from 0, over all jobs of a run: how many attempts had started before
    "state": "string",  # a word of hpc.slurm.states
    "reason": "string",  # why it ended so, or what it waits for
    "exit_code": "Int64",
    "signal": "Int64",
    "submitted": "datetime64[us, UTC]",  # submitted, or requeued
    "eligible": "datetime64[us, UTC]",  # from when on it could start
    "started": "datetime64[us, UTC]",
    "ended": "datetime64[us, UTC]",
    "wait_s": "Float64",  # seconds between submitted and started
    "elapsed_s": "Float64",  # seconds between started and ended, or now
    "partition": "string",
    "num_nodes": "Int64",
    "nodes": "object",  # list of names
    "gpus": "Int64",
    "gpu_hours": "Float64",
}
_REASONS = {
    JobState.CANCELLED: "cancelled",
    JobState.TIMEOUT: "reached its time limit",
    JobState.PREEMPTED: "made way for another job",
    JobState.NODE_FAIL: "a node failed",
    JobState.OUT_OF_MEMORY: "out of memory",
    JobState.REQUEUED: "requeued",
}
_HAS_STARTED = {JobState.PREEMPTED, JobState.REQUEUED, JobState.NODE_FAIL, JobState.TIMEOUT}


@dataclass(frozen=True)
class SubmittedJob:
    """A job that belongs to a run.

    Attributes:
        job: id.
        submitted: when the run's events recorded it; None if unknown.
        roles: what runs in each component.
    """

    job: str
    submitted: datetime | None = None
    roles: tuple[str, ...] = ()


def attempts(run: str | Path | Iterable[str], client: SlurmClient | None = None) -> pd.DataFrame:
    """Every attempt of every component of a run's jobs (or of jobs given by id), oldest first; columns: `COLUMNS`.

    Raises:
        SlurmError: there is no accounting database here, or it does not answer.
        UserError: the run has no Slurm jobs.
    """
    jobs = submitted_jobs(Path(run)) if isinstance(run, str | Path) else [SubmittedJob(job) for job in run]
    client = client or SlurmClient()
    if not client.has_accounting:
        raise SlurmError("this cluster has no accounting database (slurmdbd), so past attempts are unknown.")
    times = [job.submitted for job in jobs if job.submitted]
    since = min(times) - _CLOCK_SLACK if times and len(times) == len(jobs) else None
    records = client.sacct((job.job for job in jobs), since=since, every_attempt=True)
    return to_frame(records, jobs)


def submitted_jobs(run_dir: Path) -> list[SubmittedJob]:
    """The Slurm jobs of a run, from its events with a `job_id` (and `components`, if given).

    Raises:
        UserError: there are none.
    """
    events = RunLayout(run_dir).events
    if not events.is_file():
        raise UserError(f"{run_dir} is not a run: it has no {events.name}.")
    found: dict[str, SubmittedJob] = {}
    for event in read_lines(events):
        if event.get("job_id") and str(event["job_id"]) not in found:
            time = datetime.fromtimestamp(event["time"], UTC) if "time" in event else None
            found[str(event["job_id"])] = SubmittedJob(
                str(event["job_id"]), time, tuple(event.get("components", ()))
            )
    if not found:
        raise UserError(f"{run_dir} has not been submitted to Slurm: no event in {events.name} has a job_id.")
    return list(found.values())


def to_frame(records: Iterable[JobRecord], jobs: Sequence[SubmittedJob]) -> pd.DataFrame:
    """The table of these records. Records of another job that once had the same id are left out."""
    import pandas as pd

    known = {job.job: job for job in jobs}
    own = [record for record in records if _belongs(record, known)]
    own.sort(key=lambda record: (record.submitted or datetime.min.replace(tzinfo=UTC), record.db_index or 0))
    started: dict[int, int] = defaultdict(int)  # by component
    rows = []
    for record in own:
        component = record.key.component or 0
        rows.append(_row(record, component, started[component], known[record.key.job].roles))
        # Without the state one that was preempted at once would not count: the database may learn of its start late.
        started[component] += record.started is not None or record.state in _HAS_STARTED
    # Not by time alone: components of one job may be requeued in different seconds, in any order.
    rows.sort(key=lambda row: (row["attempt"], int(row["job_id"]), row["component"]))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def _belongs(record: JobRecord, known: Mapping[str, SubmittedJob]) -> bool:
    job = known.get(record.key.job)
    if job is None:
        return False
    return job.submitted is None or not record.submitted or record.submitted >= job.submitted - _CLOCK_SLACK


def _row(record: JobRecord, component: int, attempt: int, roles: Sequence[str]) -> dict[str, Any]:
    waited = record.started - record.submitted if record.started and record.submitted else None
    gpus = record.gpus or 0
    return {
        "job_id": record.key.job,
        "component": component,
        "role": roles[component] if component < len(roles) else None,
        "attempt": attempt,
        "state": record.state.value,
        "reason": _reason(record),
        "exit_code": record.exit_code,
        "signal": record.signal,
        "submitted": record.submitted,
        "eligible": record.eligible,
        "started": record.started,
        "ended": record.ended,
        "wait_s": waited.total_seconds() if waited is not None else None,
        "elapsed_s": record.elapsed_s,
        "partition": record.partition,
        "num_nodes": record.num_nodes,
        "nodes": list(record.nodes),
        "gpus": gpus,
        "gpu_hours": gpus * record.elapsed_s / 3600,
    }


def _reason(record: JobRecord) -> str | None:
    if record.state is JobState.FAILED:
        return f"signal {record.signal}" if record.signal else f"exit code {record.exit_code}"
    return _REASONS.get(record.state) or record.reason


def main(argv: list[str]) -> int:
    """The command line; returns an exit code."""
    parser = cli.make_parser("hpc.accounting", __doc__, EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="name or directory")
    parser.add_argument(
        "--json", action="store_true", help="print a list of objects with every column instead of a table"
    )
    cli.add_runs_dir(parser)
    args = parser.parse_args(argv)
    table = attempts(find_run(args.run, args.runs_dir).root)
    if args.json:
        print(table.to_json(orient="records", date_format="iso", indent=2))
        return cli.EXIT_OK
    shown = ("job_id", "component", "role", "attempt", "state", "wait_s", "elapsed_s", "gpus", "gpu_hours", "nodes",
             "reason")  # fmt: skip
    cli.print_table([name.replace("_", "-") for name in shown],
                    [[_cell(row[name]) for name in shown] for row in table.to_dict("records")])  # fmt: skip
    print(f"{table.gpu_hours.sum():.2f} GPU-hours in all")
    return cli.EXIT_OK


def _cell(value: Any) -> str:
    import pandas as pd

    if isinstance(value, list):
        return compress(value) or "-"
    if pd.isna(value):
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
