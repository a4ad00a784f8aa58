"""What must be true of a run that has weathered a storm: nothing lost, nothing done twice, nothing left behind."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

from hpc.chaos.actions import processes_of
from hpc.runs.find import read_run
from hpc.runs.slurm_jobs import ask_slurm
from hpc.runs.state import to_status
from hpc.sandbox import Sandbox
from hpc.slurm.client import SlurmClient
from rltrain.run.files import read_lines
from rltrain.run.finished import finished_steps
from rltrain.run.layout import RunLayout

_PATIENCE_SECONDS = 60.0  # Slurm takes its time to end the last steps of a job
_DONE = ("finished", "COMPLETING")


def judge(layout: RunLayout, steps: int, cluster: Sandbox, curve: list[float] | None) -> list[str]:
    """What is not as it must be, in words.

    Args:
        layout: of the run, which has ended.
        steps: that it was to train.
        cluster: on which it ran.
        curve: the reward of each step of an undisturbed run; None if nobody knows.
    """
    return [
        *_of_metrics(layout, steps, curve),
        *_of_state(layout, steps, SlurmClient(cluster.env)),
        *_of_attempts(layout),
        *_of_what_is_left(layout.root, cluster),
    ]


def _of_metrics(layout: RunLayout, steps: int, curve: list[float] | None) -> list[str]:
    """Each step has one line, or more that say the same; the newest lines are the undisturbed curve."""
    rows = [row for row in read_lines(layout.metrics) if "rollout/reward" in row]
    seen = [int(row["step"]) for row in rows]
    problems = []
    if missing := sorted(set(range(steps)) - set(seen)):
        problems.append(f"metrics.jsonl lacks steps {missing}")
    if curve and (wrong := sorted({step for step, row in zip(seen, rows, strict=True)
                                   if step < steps and row["rollout/reward"] != curve[step]})):  # fmt: skip
        problems.append(f"the curve is another one at steps {wrong}")
    for before, step in itertools.pairwise(seen):
        if step > before + 1:
            problems.append(f"step {step} follows step {before}")
    by_attempt = [(int(row["attempt"]), int(row["step"])) for row in rows]
    if twice := sorted({entry for entry in by_attempt if by_attempt.count(entry) > 1}):
        problems.append(f"an attempt logged a step twice: {twice}")
    return problems


def _of_state(layout: RunLayout, steps: int, client: SlurmClient) -> list[str]:
    problems = []
    if finished_steps(layout) != steps:
        problems.append(f"finished.json says {finished_steps(layout)} steps, not {steps}")
    # A job that lost a node after the last step is requeued once more, and ends when it sees that all is done.
    if not _until(lambda: _status(layout, client) in _DONE):
        problems.append(f"hpc.status says {_status(layout, client)}")
    if (done := read_run(layout).step) != steps:
        problems.append(f"hpc.status says {done} steps")
    return problems


def _status(layout: RunLayout, client: SlurmClient) -> str:
    """Not status.json: a supervisor that was killed after the last step could not write its last word."""
    record = read_run(layout)
    return to_status(record, ask_slurm(record.slurm_jobs, client)).state


def _of_attempts(layout: RunLayout) -> list[str]:
    """Attempts are numbered without a gap, and one at a time is at work."""
    begun = [event["attempt"] for event in read_lines(layout.events) if event["kind"] == "attempt_started"]
    if begun != list(range(len(begun))):
        return [f"attempts have the numbers {begun}"]
    return []


def _of_what_is_left(run_dir: Path, cluster: Sandbox) -> list[str]:
    problems = []
    if not _until(lambda: not processes_of(run_dir)):
        left = [" ".join(process.command)[:80] for process in processes_of(run_dir)]
        problems.append(f"processes are left: {left}")
    queue = ("squeue", "-h", "--states=PENDING,RUNNING,SUSPENDED", "-o", "%i %T %r")
    if not _until(lambda: not cluster.run(*queue).strip()):
        problems.append(f"jobs are left: {cluster.run(*queue).split()}")
    names = [path.name for path in run_dir.rglob("*") if path.name.endswith((".tmp", ".partial"))]
    if names:
        problems.append(f"unfinished files are left: {names}")
    return problems


def _until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
