"""Follow a run through its files: what the live view and the summary know about it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc.layout import RunLayout

Record = dict[str, Any]


class JsonLines:
    """Objects of a growing file of JSON lines, each given once; a line without its end waits for it."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[Record]:
        """Objects that are new since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return list(_parse(whole.splitlines()))


def _parse(lines: Iterable[bytes]) -> Iterable[Record]:
    for line in lines:
        with contextlib.suppress(ValueError):  # a crash may have cut a line short
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def read_status(layout: RunLayout) -> Record:
    """`status.json`, or an empty dict while there is none."""
    try:
        return json.loads(layout.status.read_text())
    except (FileNotFoundError, ValueError):
        return {}


@dataclass
class RunState:
    """What is known of a run: its status, its steps, and the roles of the newest attempt."""

    status: Record = field(default_factory=dict)
    metrics: dict[int, Record] = field(default_factory=dict)  # by step; -1 is before training
    roles: dict[str, str] = field(default_factory=dict)  # "engine-0" → starting, ready, died or ended

    def add_metrics(self, record: Record) -> None:
        """Take up a line of `metrics.jsonl`; a step that is trained again replaces its first try.

        Lines with the same step and attempt are one: an evaluation may come later than its step.
        """
        if isinstance(record.get("step"), int):
            before = self.metrics.get(record["step"], {})
            same = "attempt" in record and before.get("attempt") == record["attempt"]
            self.metrics[record["step"]] = before | record if same else record

    def add_event(self, event: Record) -> None:
        """Take up a line of `events.jsonl`."""
        states = {"role_started": "starting", "role_ready": "ready", "role_died": "died"}
        name = f"{event.get('role')}-{event.get('index')}"
        if event.get("kind") == "attempt_started":
            self.roles = {}
        elif event.get("kind") == "attempt_finished":
            self.roles = {role: state if state == "died" else "ended" for role, state in self.roles.items()}
        elif event.get("kind") in states:
            self.roles[name] = states[event["kind"]]
        if event.get("kind") == "role_ready" and name == "trainer-0":  # it speaks for all ranks
            self.roles |= {role: "ready" for role in self.roles if role.startswith("trainer-")}

    @property
    def steps(self) -> list[Record]:
        """Trained steps in order."""
        return [self.metrics[step] for step in sorted(self.metrics) if step >= 0]

    def series(self, name: str) -> list[float]:
        """One metric over all steps that have it, the one before training included."""
        return [self.metrics[step][name] for step in sorted(self.metrics) if name in self.metrics[step]]

    @property
    def eval_names(self) -> list[str]:
        """Metrics with the mean reward of an evaluation set, such as `eval/test`."""
        names = {name for record in self.metrics.values() for name in record}
        return sorted(name for name in names if name.startswith("eval/") and name.count("/") == 1)

    def seconds_left(self, total: int) -> float | None:
        """Estimate from the last steps; None before the first of them."""
        recent = [step["perf/step_s"] for step in self.steps[-10:] if "perf/step_s" in step]
        if not recent:
            return None
        return max(0, total - 1 - max(self.metrics)) * sum(recent) / len(recent)


class RunFeed:
    """Keeps a `RunState` up to date."""

    def __init__(self, layout: RunLayout) -> None:
        self._layout = layout
        self._metrics, self._events = JsonLines(layout.metrics), JsonLines(layout.events)
        self.state = RunState()

    def poll(self) -> tuple[list[Record], list[Record]]:
        """Read what is new; returns the new metrics and events too."""
        metrics, events = self._metrics.read(), self._events.read()
        for record in metrics:
            self.state.add_metrics(record)
        for event in events:
            self.state.add_event(event)
        self.state.status = read_status(self._layout)
        return metrics, events
