"""What happened in a session, for the notebook: one entry a turn, and what went wrong."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any, Literal

_MOST_EVENTS = 100  # an agent that asks for nonsense in a loop must not fill the memory
_MOST_TEXT = 500

Origin = Literal["root", "append", "fork"]


@dataclass
class TurnRecord:
    """One turn; times in seconds since the session began, counts in tokens.

    Attributes:
        origin: "append": goes on from its parent. "fork": it does, beside another one that does, or its history was
            held but has been changed. "root": begins anew.
        parent: the turn whose tokens the prompt begins with.
        forked_from: the turn whose conversation it goes on with in other tokens.
        sample: which of the session's samples it is trained in.
    """

    turn: int
    parent: int | None
    origin: Origin
    api: str
    began: float
    ended: float
    prompt_tokens: int
    added_tokens: int
    sampled_tokens: int
    cached_tokens: int
    finish: str
    tools: list[str] = field(default_factory=list)
    forked_from: int | None = None
    sample: int | None = None


@dataclass(frozen=True)
class Event:
    """Something that went wrong, or that an agent should know: `kind` is one word of those in docs/agents.md."""

    seconds: float
    kind: str
    message: str


class SessionRecord:
    """Turns and events of a session."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.turns: dict[int, TurnRecord] = {}
        self.events: list[Event] = []
        self.events_left_out = 0

    def now(self) -> float:
        """Seconds since the session began."""
        return time.perf_counter() - self._began

    def note(self, kind: str, message: str) -> None:
        """Keep an event; the same one only once, and not more than a hundred."""
        message = message[:_MOST_TEXT]
        if any(event.kind == kind and event.message == message for event in self.events):
            return
        if len(self.events) >= _MOST_EVENTS:
            self.events_left_out += 1
        else:
            self.events.append(Event(round(self.now(), 3), kind, message))

    def as_json(self, session: str) -> dict[str, Any]:
        """Everything, for a sample's metadata."""
        return {
            "id": session,
            "seconds": round(self.now(), 3),
            "turns": [dataclasses.asdict(turn) for turn in self.turns.values()],
            "events": [dataclasses.asdict(event) for event in self.events],
            "events_left_out": self.events_left_out,
        }
