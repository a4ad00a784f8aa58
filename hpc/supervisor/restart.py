"""Whether a job runs again after an attempt: pure functions of how the attempt ended and what Slurm says of the job.

Slurm requeues some jobs by itself, and `scontrol requeue` also brings back a job that a person has just cancelled. So
the job's own record is asked first:

    it has been restarted since we began            Slurm requeues it: nothing to do
    it is ending, and has not been restarted        cancelled: stay ended (out of time: requeue)
    it runs, and is being preempted                 grace time: requeue, as exit 0 now would end it for good
    it runs                                         the time limit is near (SIGUSR2): requeue; a person's signal: end
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hpc.slurm.states import JobState
from hpc.supervisor.causes import Cause

MIN_LEAD = 120  # seconds
MAX_LEAD = 3600
_BAD_NODE_SECONDS = 24 * 3600.0
_BAD_NODE_FAILURES = 2


class Action(StrEnum):
    """The next step for the job."""

    REQUEUE = "requeue"  # ask Slurm to
    WAIT = "wait"  # Slurm does so itself
    END = "end"


@dataclass(frozen=True)
class Decision:
    """The next step, and the reason in words for people."""

    action: Action
    reason: str


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Attributes:
        state: `finished`, `stopped` or `failed`.
        signal: name of the signal that asked it to stop, if one did.
        never_restart: a role said that running again would fail in the same way.
        node_failed: Slurm said that a node failed.
        cause: of a failure.
        idle_failures: attempts in a row, with this one, that failed by their code without having saved anything.
        idle_attempts: attempts in a row, with this one, that saved nothing, whatever ended them.
    """

    state: str
    signal: str | None = None
    never_restart: bool = False
    node_failed: bool = False
    cause: Cause = Cause.CODE
    idle_failures: int = 0
    idle_attempts: int = 0


@dataclass(frozen=True)
class JobView:
    """The job as Slurm describes it; see `hpc.slurm.records.JobDetail`."""

    state: JobState
    restarts: int
    may_requeue: bool
    is_preempted: bool
    is_out_of_time: bool = False


@dataclass(frozen=True)
class Limits:
    """How often a job may run again.

    Attributes:
        max_restarts: in all.
        max_failures: attempts in a row that failed by their code without a new checkpoint.
        max_idle: attempts in a row without a new checkpoint, whatever ended them.
    """

    max_restarts: int = 100
    max_failures: int = 1
    max_idle: int = 5


def decide(ending: Ending, job: JobView | None, own_restarts: int, limits: Limits) -> Decision:
    """Decide what happens after an attempt.

    Args:
        ending: how it ended.
        job: what Slurm says; None if it does not answer.
        own_restarts: how often the job had been restarted when the attempt began.
        limits: bounds.
    """
    if ending.state == "finished":
        return Decision(Action.END, "the run is finished")
    if job and job.restarts > own_restarts:
        return Decision(Action.WAIT, "Slurm requeues the job")
    wanted, why = _wants_to_run(ending, job, limits)
    if not wanted:
        return Decision(Action.END, why)
    if ending.idle_attempts >= limits.max_idle:
        return Decision(Action.END, f"{why}, but {_too_idle(ending.idle_attempts)}")
    if own_restarts >= limits.max_restarts:
        return Decision(Action.END, f"{why}, but it has been requeued {own_restarts} times (--max-restarts)")
    if job and not job.may_requeue:
        return Decision(Action.END, f"{why}, but Slurm may not requeue this job: resubmit it")
    return Decision(Action.REQUEUE, why)


def _wants_to_run(ending: Ending, job: JobView | None, limits: Limits) -> tuple[bool, str]:
    if ending.never_restart:
        return False, "running again would fail in the same way"
    if job and _is_ending(job.state):
        return (True, "out of time") if job.is_out_of_time else (False, "the job was cancelled")
    if ending.state == "failed":
        return _after_failure(ending, limits)
    if ending.signal == "SIGINT":
        return False, "stopped on request"
    if ending.signal == "SIGTERM" and job and not job.is_preempted:
        return False, "stopped by a signal that was not Slurm's"
    if ending.signal == "SIGUSR2":
        return True, "the job was preempted" if job and job.is_preempted else "the time limit is near"
    return True, "the job was preempted" if ending.signal else "the trainer asked to be run again"


def _after_failure(ending: Ending, limits: Limits) -> tuple[bool, str]:
    if ending.node_failed:
        return True, "a node failed"
    if ending.cause is Cause.CLUSTER:
        return True, "the cluster failed, not the code"
    if ending.cause is Cause.UNKNOWN:
        return True, "an attempt ended for an unknown reason"
    if ending.idle_failures >= limits.max_failures:
        return False, _too_many(ending.idle_failures)
    return True, "an attempt failed"


def _too_many(failures: int) -> str:
    tries = f"{failures} attempt{'s' * (failures > 1)}"
    return f"{tries} in a row failed without a new checkpoint (--max-failures)"


def _too_idle(attempts: int) -> str:
    return f"{attempts} attempts in a row ended without a new checkpoint, whatever ended them"


def _is_ending(state: JobState) -> bool:
    return state is JobState.COMPLETING or state.is_final


def idle_failures(events: Iterable[Mapping[str, Any]]) -> int:
    """From a run's events: how many attempts in a row, up to the last, failed by their code without having saved
    anything.

    An attempt that was interrupted (preempted, out of time), killed or lost a node says nothing about the code. What
    was before the last submission by a person does not count.
    """
    listed = since_submission(events)
    lost_a_node = {event.get("attempt") for event in listed if event.get("kind") == "node_failed"}
    saved = {event.get("attempt") for event in listed if event.get("kind") == "checkpoint_saved"}
    count = 0
    for event in listed:
        attempt = event.get("attempt")
        if event.get("kind") == "checkpoint_saved":
            count = 0
        elif event.get("kind") == "attempt_finished" and event.get("state") == "failed":
            is_code = event.get("cause", Cause.CODE) == Cause.CODE
            count += is_code and attempt not in lost_a_node | saved
    return count


def idle_attempts(events: Iterable[Mapping[str, Any]]) -> int:
    """From a run's events: how many attempts have begun in a row, up to the last, that saved nothing."""
    count = 0
    for event in since_submission(events):
        if event.get("kind") == "checkpoint_saved":
            count = 0
        count += event.get("kind") in ("attempt_started", "never_begun")
    return count


def since_submission(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events since a person has submitted the run, for the last time."""
    since: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("kind") == "run_submitted":
            since = []
        else:
            since.append(event)
    return since


def why_not_begin(
    events: Iterable[Mapping[str, Any]], limits: Limits, was_requeued: bool = False
) -> str | None:
    """From a run's events: the reason why another attempt is useless, or None.

    A job that was requeued had its decision when its last attempt ended; but Slurm requeues some by itself.
    """
    since = since_submission(events)
    if (idle := idle_attempts(since)) >= limits.max_idle:
        return _too_idle(idle)
    if was_requeued:
        return None
    ends = [event for event in since if event.get("kind") == "attempt_finished"]
    if ends and ends[-1].get("never_restart"):
        return "the last attempt said that running again would fail in the same way"
    failures = idle_failures(since)
    return _too_many(failures) if failures >= limits.max_failures else None


def bad_nodes(events: Iterable[Mapping[str, Any]], now: float) -> list[str]:
    """Nodes to avoid, the worst first: those that failed twice within a day. `now` is in Unix seconds."""
    failures: dict[str, int] = {}
    for event in events:
        if event.get("kind") == "node_failed" and now - event.get("time", 0.0) < _BAD_NODE_SECONDS:
            failures[event["node"]] = failures.get(event["node"], 0) + 1
    bad = [node for node, count in failures.items() if count >= _BAD_NODE_FAILURES]
    return sorted(bad, key=lambda node: (-failures[node], node))


def can_be_spared(bad: Sequence[str], nodes: Collection[str], needed: int) -> list[str]:
    """As many of the `bad` nodes, the worst first, as a partition of `nodes` can do without for a job of `needed`.

    A job that excluded more of them would wait for ever.
    """
    return [node for node in bad if node in nodes][: max(0, len(nodes) - needed)]


def save_lead(metrics: Iterable[Mapping[str, Any]], minimum: int = MIN_LEAD) -> int:
    """Seconds before the time limit at which a run has to be told to save.

    As long as its slowest step and its slowest save took together, half as much again, and the half minute by which
    Slurm may be late.
    """
    steps = [float(record["perf/step_s"]) for record in metrics if "perf/step_s" in record]
    return max(minimum, min(MAX_LEAD, round(1.5 * max(steps, default=0.0)) + 30))


def step_seconds(events: Iterable[Mapping[str, Any]], metrics: Iterable[Mapping[str, Any]]) -> float:
    """Seconds from the start of an attempt to the end of its first step, as measured so far: the slowest of each."""
    begun: dict[int, float] = {}
    starts = [0.0]
    for event in events:
        attempt, time = event.get("attempt", 0), float(event.get("time", 0.0))
        if event.get("kind") == "attempt_started":
            begun[attempt] = time
        elif event.get("kind") == "weights_updated" and attempt in begun:  # the first: engines can begin
            elapsed = time - begun.pop(attempt)  # of events of older versions; the clock may have jumped
            starts.append(float(event.get("elapsed_s", elapsed)))
    return max(starts) + max(
        (float(row["perf/step_s"]) for row in metrics if "perf/step_s" in row), default=0.0
    )
