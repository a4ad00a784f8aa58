"""One row a run for the overview: cheap enough to be read every few seconds for thousands of runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rltrain.run.files import read_json, read_last_lines
from rltrain.run.finished import asked_steps, finished_steps, is_finished
from rltrain.run.layout import RunLayout
from rltrain.run.metric_lines import newest_rows

_TAIL_BYTES = 64 * 1024  # the last metrics and events of a run
_LAST_STEPS = 20  # whose time tells how long the rest takes


def run_rows(runs: Iterable[Path]) -> list[dict[str, Any]]:
    """A row for each run, the one that wrote last first. See `run_row`."""
    return sorted(map(run_row, runs), key=lambda row: -row["updated"])


def run_row(path: Path) -> dict[str, Any]:
    """What the overview shows of a run.

    Returns:
        name, state (as its files tell it: what it does now, or how it ended), step (number of steps trained),
        num_rollout, reward of the last step, eta (seconds to go; None if it does not train), attempts, updated (Unix
        seconds of its last word).
    """
    layout = RunLayout(path)
    rows = newest_rows(read_last_lines(layout.metrics, _TAIL_BYTES))
    events = read_last_lines(layout.events, _TAIL_BYTES)
    status: dict[str, Any] = _mapping(read_json(layout.status))
    last = max(rows, default=-1)
    total = asked_steps(layout)
    done = finished_steps(layout)
    finished = is_finished(layout, 1 if total is None else total)  # not so once a run goes on to more steps
    state = "finished" if finished else _state(events, status)
    reward = [rows[step]["rollout/reward"] for step in sorted(rows) if "rollout/reward" in rows[step]]
    return {
        "name": path.name,
        "state": state,
        "step": max(last + 1, done),
        "num_rollout": total,
        "reward": reward[-1] if reward else None,
        "eta": _eta(rows, last, total) if state in ("generating", "training", "weights", "saving") else None,
        "attempts": 1 + max((int(event.get("attempt", 0)) for event in events), default=-1),
        "updated": max(map(_changed, (layout.metrics, layout.events, layout.status, layout.run_json))),
    }


def _state(events: list[dict[str, Any]], status: dict[str, Any]) -> str:
    """How the last attempt ended; what it does, if it has not."""
    marks = [event for event in events if event.get("kind") in ("attempt_started", "attempt_finished")]
    if marks and marks[-1]["kind"] == "attempt_finished":
        return str(marks[-1].get("state", "stopped"))
    return str(status.get("phase", "submitted"))


def _eta(rows: dict[int, dict[str, Any]], last: int, total: int | None) -> float | None:
    seconds = [rows[step]["perf/step_s"] for step in sorted(rows) if "perf/step_s" in rows[step]]
    if not seconds or total is None:
        return None
    return statistics.median(seconds[-_LAST_STEPS:]) * max(0, total - last - 1)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
