"""Follow a run through its files, for the live view and the summary."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from rltrain.run.files import GrowingLines, Record, read_json
from rltrain.run.layout import RunLayout
from rltrain.run.metric_lines import add_row, sound_row


def read_status(layout: RunLayout) -> Record:
    """`status.json`, or an empty dict while it does not exist."""
    return read_json(layout.status) or {}


@dataclass
class RunState:
    """The present knowledge of a run: its status, its steps, and the roles of the newest attempt."""

    status: Record = field(default_factory=dict)
    metrics: dict[int, Record] = field(default_factory=dict)  # by step; -1 is before training
    roles: dict[str, str] = field(default_factory=dict)  # "engine-0" → starting, ready, died or ended
    saved: int | None = None  # step of the newest checkpoint
    unsaved: str | None = None  # why the one after it could not be written, if so

    def add_metrics(self, record: Record) -> None:
        """Take up a line of `metrics.jsonl`."""
        add_row(self.metrics, record)

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
        if event.get("kind") == "checkpoint_saved":
            self.saved, self.unsaved = event.get("step"), None
        elif event.get("kind") == "checkpoint_failed":
            self.unsaved = str(event.get("reason"))
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
        self._metrics, self._events = GrowingLines(layout.metrics), GrowingLines(layout.events)
        self.state = RunState()

    def poll(self) -> tuple[list[Record], list[Record]]:
        """Read what is new; returns the new metrics and events too."""
        metrics = [row for line in self._metrics.read() if (row := sound_row(line)) is not None]
        events = self._events.read()
        for record in metrics:
            self.state.add_metrics(record)
        for event in events:
            self.state.add_event(event)
        with suppress(OSError):  # of a network disk: the status that is known goes on holding
            self.state.status = read_status(self._layout)
        return metrics, events
