"""What must be true of a run that has weathered a storm: nothing lost, nothing done twice, nothing left behind."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpc.chaos.actions import processes_of
from hpc.chaos.clocks import CLOCK
from hpc.runs.find import read_run, read_submissions
from hpc.runs.slurm_jobs import ask_slurm
from hpc.runs.state import to_status
from hpc.sandbox import Sandbox
from hpc.slurm.client import SlurmClient, SlurmError, SlurmUnavailableError
from hpc.slurm.records import JobDetail
from hpc.slurm.states import JobState
from rltrain.run.files import read_lines
from rltrain.run.finished import finished_steps
from rltrain.run.layout import RunLayout
from rltrain.sglang.leftovers import sweep

_PATIENCE_SECONDS = 60.0  # Slurm takes its time to end the last steps of a job
_SETTLE_SECONDS = 10.0
_AT_WORK = "PENDING,RUNNING,SUSPENDED"
_DONE = ("finished", "COMPLETING")
_ROOT = Path(__file__).parents[2]


def judge(
    layout: RunLayout,
    steps: int,
    cluster: Sandbox,
    curve: list[float] | None,
    before: Traces,
    *,
    may_fail: bool = False,
) -> list[str]:
    """What is not as it must be, in words.

    Args:
        layout: of the run, which has ended.
        steps: that it was to train.
        cluster: on which it ran.
        curve: the reward of each step of an undisturbed run; None if nobody knows.
        before: what lay on the nodes before it was submitted.
        may_fail: whether its last job may have ended badly though the run is finished: somebody has cancelled it, or
            killed its batch process.
    """
    client = SlurmClient(cluster.env)
    # One whose node failed at the very end is COMPLETING, waits, and runs once more, to see that all is done.
    _until(lambda: not _jobs(client, f"{_AT_WORK},COMPLETING"))
    return [
        *_of_metrics(layout, steps, curve),
        *_of_state(layout, steps, client),
        *_of_exit_codes(layout, cluster, client, may_fail),
        *_of_attempts(layout),
        *_of_what_is_left(layout.root, client),
        *_of_nodes(before, cluster),
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
        problems.append(f"the curve differs at steps {wrong}")
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


def _of_exit_codes(layout: RunLayout, cluster: Sandbox, client: SlurmClient, may_fail: bool) -> list[str]:
    """The job of a finished run has ended well, and `hpc.status` can be asked."""
    problems, jobs = [], []
    try:
        jobs = _last_job(layout, client)
    except SlurmError as error:
        problems.append(f"what became of the last job is unknown: {error}")
    if not may_fail and (
        bad := [job for job in jobs if job.state.is_final and job.state != JobState.COMPLETED]
    ):
        problems.append(f"the last job is {bad[0].state} ({bad[0].exit_code}), though the run is finished")
    command = [sys.executable, "-m", "hpc.status", str(layout.root), "--json"]
    asked = subprocess.run(command, env=cluster.env, cwd=_ROOT, capture_output=True, text=True)
    if asked.returncode or json.loads(asked.stdout)[0]["state"] not in _DONE:
        problems.append(f"`hpc.status` ends with {asked.returncode}: {asked.stdout}{asked.stderr}")
    return problems


def _last_job(layout: RunLayout, client: SlurmClient) -> list[JobDetail]:
    """As soon as Slurm answers: it may have been started again a moment ago.

    Raises:
        SlurmError: it does not.
    """
    job, deadline = read_submissions(layout)[-1].job_id, time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return client.job_details(job)[:1]
        except SlurmUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _of_attempts(layout: RunLayout) -> list[str]:
    """Attempts are numbered without a gap, and one at a time is at work.

    Of one that was killed, or met a full disk, in the moment before it says that it begins, there is only a directory.
    """
    begun = [event["attempt"] for event in read_lines(layout.events) if event["kind"] == "attempt_started"]
    numbers = layout.attempts()
    silent = {each for each in numbers if not any(layout.log_dir(each).glob("srun-*.log"))} - set(begun)
    if begun != [each for each in range(max([*begun, *numbers], default=-1) + 1) if each not in silent]:
        return [f"attempts have the numbers {begun}"]
    return []


def _of_what_is_left(run_dir: Path, client: SlurmClient) -> list[str]:
    problems = []
    if not _until(lambda: not processes_of(run_dir)):
        left = [" ".join(process.command)[:80] for process in processes_of(run_dir)]
        problems.append(f"processes are left: {left}")
    if not _until(lambda: not _jobs(client, _AT_WORK)):
        problems.append(f"jobs are left: {_jobs(client, _AT_WORK)}")
    names = [path.name for path in run_dir.rglob("*") if path.name.endswith((".tmp", ".partial"))]
    if names:
        problems.append(f"unfinished files are left: {names}")
    return problems


def _jobs(client: SlurmClient, states: str) -> list[str]:
    """Id, state and reason of the jobs in these states."""
    try:
        return client.run("squeue", "-h", f"--states={states}", "-o", "%i %T %r").splitlines()
    except SlurmError as error:
        return [str(error)]


@dataclass(frozen=True)
class Traces:
    """What lies on the nodes of a sandbox that are on, beside files: each has a /dev/shm and mounts of its own.

    Attributes:
        shared_memory: names of files in /dev/shm, by node.
        mounts: where something is mounted that may be a run's, by node and for this machine.
    """

    shared_memory: Mapping[str, frozenset[str]]
    mounts: Mapping[str, tuple[str, ...]]


def temporary_directory(cluster: Sandbox) -> Path:
    """The TMPDIR of storms' runs on a sandbox, the same on all nodes."""
    return cluster.directory / "tmp"


def traces(cluster: Sandbox) -> Traces:
    """Look at all nodes."""
    shared, mounts = {}, {"this machine": _mounts("self", cluster)}
    for node, pid in _slurmds(cluster).items():
        with suppress(OSError):  # it has just lost its power
            shared[node] = frozenset(path.name for path in Path("/proc", str(pid), "root/dev/shm").iterdir())
            mounts[node] = _mounts(str(pid), cluster)
    return Traces(shared, mounts)


def _slurmds(cluster: Sandbox) -> dict[str, int]:
    """Process of each node's slurmd, as this machine numbers it."""
    conf, found = cluster.variables["SLURM_CONF"], {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "cmdline").read_text(errors="replace").split("\0")
            if Path(words[0]).name == "slurmd" and conf in words and "-N" in words:
                found[words[words.index("-N") + 1]] = int(path.name)
    return found


def _mounts(process: str, cluster: Sandbox) -> tuple[str, ...]:
    """Of what may be a run's; other programs of this machine mount things, too."""
    places = (str(cluster.directory), "/dev/shm", "/tmp/slurmlime", "/mnt", "/media", "/srv")
    lines = Path(f"/proc/{process}/mountinfo").read_text(errors="replace").splitlines()
    return tuple(sorted(point for line in lines if (point := line.split()[4]).startswith(places)))


def _of_nodes(before: Traces, cluster: Sandbox) -> list[str]:
    """No directory, shared memory or mount that the next engine on a node would not remove."""
    place = temporary_directory(cluster)
    sweep(place)
    left = sorted(path.name for path in place.glob("slurmlime-*"))
    problems = [f"directories are left: {left}"] if left else []
    if not _until(lambda: not _more(before, traces(cluster)), _SETTLE_SECONDS):
        problems += _more(before, traces(cluster))
    return problems


def _more(before: Traces, after: Traces) -> list[str]:
    problems = []
    for node, names in after.shared_memory.items():
        # SGLang's own are removed by the next engine on the node; all nodes of a sandbox have one directory for them.
        new = {name for name in names - before.shared_memory.get(node, frozenset()) - {CLOCK}
               if not name.startswith("sglang_")}  # fmt: skip
        if new:
            problems.append(f"shared memory is left on {node}: {sorted(new)}")
    for place, points in after.mounts.items():
        if place in before.mounts and (new_points := Counter(points) - Counter(before.mounts[place])):
            problems.append(f"mounts are left on {place}: {sorted(new_points)}")
    return problems


def _until(condition: Callable[[], bool], seconds: float = _PATIENCE_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True
