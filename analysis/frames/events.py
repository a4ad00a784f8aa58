"""Events of a job, and its attempts as these events tell them (Slurm's accounting is asked by `hpc.accounting`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.frames.steps import with_time

EVENT_KEYS = ["time", "attempt", "kind", "role", "index"]

# The columns of `attempts`: the same as in `hpc.accounting.attempts`, so that either can be used.
ATTEMPT_COLUMNS = {
    "job_id": "string",
    "component": "Int64",
    "role": "string",
    "attempt": "Int64",
    "state": "string",
    "reason": "string",
    "exit_code": "Int64",
    "signal": "Int64",
    "submitted": "datetime64[us, UTC]",
    "eligible": "datetime64[us, UTC]",
    "started": "datetime64[us, UTC]",
    "ended": "datetime64[us, UTC]",
    "wait_s": "Float64",
    "elapsed_s": "Float64",
    "partition": "string",
    "num_nodes": "Int64",
    "nodes": "object",
    "gpus": "Int64",
    "gpu_hours": "Float64",
}
_FIELDS = (
    "time",
    "attempt",
    "kind",
    "role",
    "host",
    "gpus",
    "job_id",
    "state",
    "exit_code",
    "reason",
    "elapsed_s",
)
_STATES = {"finished": "COMPLETED", "failed": "FAILED", "stopped": "REQUEUED"}


def events_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row an event, in order of time; a field that an event lacks is missing."""
    columns = list(dict.fromkeys([*EVENT_KEYS, *(name for row in rows for name in row)]))
    frame = with_time(pd.DataFrame(list(rows), columns=columns))
    frame = frame.astype({"attempt": "Int64", "index": "Int64"})
    return frame.sort_values("time", kind="stable", ignore_index=True)


def gpu_count(config: Mapping[str, Any]) -> int:
    """GPUs that a run's configuration asks for, trainers and engines together (once if they share them)."""
    train = config.get("train", config)
    actor = int(train.get("actor_num_nodes") or 1) * int(train.get("actor_num_gpus_per_node") or 0)
    rollout = int(train.get("rollout_num_gpus") or 0)
    return max(actor, rollout) if train.get("colocate") else actor + rollout


def attempts_from_events(events: pd.DataFrame, config: Mapping[str, Any]) -> pd.DataFrame:
    """One row an attempt, of `events_frame`. One that is running, or was killed, lasts until its last event.

    `gpus` is 0 for an attempt that says it had none, else the number that the configuration asks for.
    """
    gpus, lines = gpu_count(config), _lines(events)
    started = {
        line["attempt"] for line in lines if line.get("kind") == "attempt_started" and "attempt" in line
    }
    rows = [_row(lines, int(number), gpus) for number in sorted(started)]
    return pd.DataFrame(
        {
            name: pd.Series([row.get(name) for row in rows], dtype=kind)
            for name, kind in ATTEMPT_COLUMNS.items()
        }
    )


def _lines(events: pd.DataFrame) -> list[dict[str, Any]]:
    """What is known of each event, of what attempts are made of: filtering a frame again and again costs far more than
    going through a list, and there may be a thousand runs."""
    columns = [events[name].tolist() if name in events else [None] * len(events) for name in _FIELDS]
    return [
        {name: value for name, value in zip(_FIELDS, values, strict=True) if _is_known(value)}
        for values in zip(*columns, strict=True)
    ]


def _is_known(value: Any) -> bool:
    return not (
        value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)
    )


def _row(lines: list[dict[str, Any]], number: int, gpus: int) -> dict[str, Any]:
    own = [line for line in lines if line.get("attempt") == number]
    started = next(line["time"] for line in own if line.get("kind") == "attempt_started")
    before = [line for line in lines if line.get("kind") == "run_submitted" and line["time"] <= started]
    # The clock of a node may jump back while it runs an attempt.
    own = [line for line in own if line["time"] >= started or "elapsed_s" in line]
    recorded = _last(own, "attempt_started", "gpus")
    gpus = gpus if recorded is None else int(recorded)
    ended = _last(own, "attempt_finished", "time")
    elapsed = _elapsed(own, started)
    if ended is not None:
        ended = started + pd.Timedelta(seconds=elapsed)
    submitted = _last(before, "run_submitted", "time")
    reason = _reason(own)
    state = _STATES.get(str(_last(own, "attempt_finished", "state")), "RUNNING")
    if state == "REQUEUED" and reason and "preempt" in reason.lower():
        state = "PREEMPTED"
    if state == "REQUEUED" and reason and "SIGINT" in reason:  # a person's Ctrl-C: nothing brings it back
        state = "CANCELLED"
    hosts = sorted({str(line["host"]) for line in own if "host" in line})
    return {
        "job_id": _last(before, "run_submitted", "job_id"),
        "component": 0,
        "role": "all",
        "attempt": number,
        "state": state,
        "reason": reason,
        "exit_code": _last(own, "attempt_finished", "exit_code"),
        "submitted": submitted,
        "started": started,
        "ended": ended,
        "wait_s": (started - submitted).total_seconds() if submitted is not None else None,
        "elapsed_s": elapsed,
        "num_nodes": len(hosts) or None,
        "nodes": hosts,
        "gpus": gpus,
        "gpu_hours": gpus * elapsed / 3600,
    }


def _elapsed(own: list[dict[str, Any]], started: pd.Timestamp) -> float:
    """Seconds of an attempt: to its end, or to its last event. One after the end belongs to the next submission."""
    ends = [line for line in own if line.get("kind") == "attempt_finished"]
    counted = [float(line["elapsed_s"]) for line in ends or own if "elapsed_s" in line]
    return max(counted or [(line["time"] - started).total_seconds() for line in ends or own])


def _reason(own: list[dict[str, Any]]) -> str | None:
    if any(line.get("kind") == "role_died" for line in own):
        return f"{_last(own, 'role_died', 'role')} died"
    stop = _last(own, "stop_requested", "reason")
    return None if stop is None else str(stop)


def _last(lines: list[dict[str, Any]], kind: str, field: str) -> Any:
    """The field of the last event of a kind that has it; None if none has."""
    return next((line[field] for line in reversed(lines) if line.get("kind") == kind and field in line), None)
