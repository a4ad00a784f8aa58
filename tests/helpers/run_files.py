"""Files of runs as `submit` and a supervisor write them, and a client of a Slurm that prints what it is given."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpc.slurm.client import SlurmClient
from hpc.slurm.parse import SACCT_COLUMNS, SQUEUE_COLUMNS
from rltrain.run.files import append_event, finished_lines
from rltrain.run.layout import RunLayout

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
EPOCH = int(NOW.timestamp())
# The flags that every run must be given.
LEAST = [
    "--hf-checkpoint",
    "model",
    "--prompt-data",
    "p.jsonl",
    "--rollout-batch-size",
    "4",
    "--num-rollout",
    "3",
]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, which may be being written; none without a file."""
    return [json.loads(line) for line in finished_lines(path).splitlines()]


def events_of(layout: RunLayout, kind: str) -> list[dict[str, Any]]:
    """A run's events of this kind, in order."""
    return [event for event in lines_of(layout.events) if event["kind"] == kind]


def sacct_row(job: str, state: str, **fields: Any) -> str:
    known = {
        "JobID": job, "JobIDRaw": job.partition("+")[0], "State": state, "Submit": EPOCH, "Start": EPOCH + 5,
        "End": "Unknown", "ElapsedRaw": 0, "NNodes": 1, "NodeList": "n1", "ExitCode": "0:0", "AllocTRES": "",
        "DBIndex": 1,
    } | fields  # fmt: skip
    return "\x1f".join(str(known.get(name, "")) for name in SACCT_COLUMNS)


def squeue_row(job: str, state: str, **fields: Any) -> str:
    known = {
        "JobID": job, "JobIDRaw": job.partition("+")[0], "State": state, "Submit": EPOCH, "Start": "N/A",
        "End": "N/A", "Elapsed": "0:00", "NNodes": 1, "NodeList": "",
    } | fields  # fmt: skip
    return "\x1f".join(str(known.get(name, "")) for name in SQUEUE_COLUMNS)


def make_run(
    runs: Path, name: str, *, phase: str | None = None, steps: int = 0, attempts: int = 0
) -> RunLayout:
    """Files of a run of 10 steps, as `submit` and a supervisor write them."""
    layout = RunLayout(runs / name)
    layout.root.mkdir(parents=True)
    layout.config.write_text("[flags]\nlr = 1\n[train]\nnum_rollout = 10\n")
    append_event(layout.events, 0, "run_submitted", {"resumed": False})
    for attempt in range(attempts):
        layout.log_dir(attempt).mkdir(parents=True)
    if phase:
        layout.status.write_text(json.dumps({"phase": phase, "step": steps}))
    rows = [{"step": step, "rollout/reward": step / 10} for step in range(-1, steps)]
    layout.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return layout


class Slurm(SlurmClient):
    """A client whose commands print what it is given; it counts them."""

    def __init__(self, sacct: list[str] = (), squeue: list[str] = (), accounting: bool = True) -> None:  # type: ignore[assignment]
        super().__init__({"PATH": "/nowhere"})
        self.rows = {"sacct": sacct, "squeue": squeue}
        self.calls: list[tuple[str, ...]] = []
        self.config = {"ClusterName": "big", "KillWait": "30 sec"}
        self._accounting = accounting

    @property
    def has_accounting(self) -> bool:
        return self._accounting

    def run(self, *command: str, stdin: str | None = None) -> str:
        self.calls.append(command)
        return "".join(row + "\n" for row in self.rows.get(command[0], []))


def submitted_to_slurm(
    layout: RunLayout, *jobs: str, cluster: str | None = "big", kind: str = "het"
) -> RunLayout:
    entries = [
        {"job_id": job, "components": [], "cluster": cluster, "layout": kind, "submitted": NOW.isoformat()}
        for job in jobs
    ]
    layout.job.write_text(json.dumps(entries))
    return layout
