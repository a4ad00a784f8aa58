"""Events of a job, and its attempts as these events tell them (Slurm's accounting is asked by `hpc.accounting`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.frames.steps import with_time

EVENT_KEYS = ["time", "attempt", "kind", "role", "index"]

# The columns of `attempts`: the same as those of `hpc.accounting.attempts`, so that either can be used.
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
    gpus = gpu_count(config)
    numbers = sorted(events.loc[events["kind"] == "attempt_started", "attempt"].dropna().unique())
    rows = [_row(events, int(number), gpus) for number in numbers]
    return pd.DataFrame(rows, columns=list(ATTEMPT_COLUMNS)).astype(ATTEMPT_COLUMNS)


def _row(events: pd.DataFrame, number: int, gpus: int) -> dict[str, Any]:
    own = events[events["attempt"] == number]
    started = own.loc[own["kind"] == "attempt_started", "time"].iloc[0]
    before = events[(events["kind"] == "run_submitted") & (events["time"] <= started)]
    own = own[own["time"] >= started]
    recorded = _last(own[own["kind"] == "attempt_started"], "gpus")
    gpus = gpus if recorded is None else int(recorded)
    finished = own[own["kind"] == "attempt_finished"]
    ended = finished["time"].iloc[-1] if len(finished) else None
    # An event after the end belongs to the next submission.
    seen = own["time"].max() if ended is None else ended
    elapsed = (seen - started).total_seconds()
    submitted = before["time"].iloc[-1] if len(before) else None
    reason = _reason(own)
    state = _STATES.get(str(_last(finished, "state")), "RUNNING")
    if state == "REQUEUED" and reason and "preempt" in reason.lower():
        state = "PREEMPTED"
    if state == "REQUEUED" and reason and "SIGINT" in reason:  # a person's Ctrl-C: nothing brings it back
        state = "CANCELLED"
    hosts = sorted({str(host) for host in own.get("host", pd.Series(dtype=object)).dropna()})
    return {
        "job_id": _last(before, "job_id"),
        "component": 0,
        "role": "all",
        "attempt": number,
        "state": state,
        "reason": reason,
        "exit_code": _last(finished, "exit_code"),
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


def _reason(own: pd.DataFrame) -> str | None:
    died = own[own["kind"] == "role_died"]
    if len(died):
        return f"{_last(died, 'role')} died"
    stop = _last(own[own["kind"] == "stop_requested"], "reason")
    return None if stop is None else str(stop)


def _last(frame: pd.DataFrame, column: str) -> Any:
    if column not in frame:
        return None
    values = frame[column].dropna()
    return values.iloc[-1] if len(values) else None
