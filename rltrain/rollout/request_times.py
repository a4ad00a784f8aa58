"""Where the requests of one rollout spent their time: waiting, prefill, decode; the rest is tools and environments.

Generation functions have slime's signatures, which hold no clock, so the requests that are sent while a rollout is
generated find its clock in a context variable. Tasks that the function starts inherit it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from rltrain.sample import Sample

_current: ContextVar[RequestTimes | None] = ContextVar("request_times", default=None)


class RequestTimes:
    """Seconds that add up over the requests of one rollout, also of those sent side by side."""

    __slots__ = ("_began", "_busy", "_since", "_under_way", "decode", "prefill", "queue")

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.queue = self.prefill = self.decode = 0.0
        self._busy = 0.0  # while at least one request was under way
        self._under_way = 0
        self._since = 0.0

    def request_began(self) -> None:
        """A request goes out."""
        if not self._under_way:
            self._since = time.perf_counter()
        self._under_way += 1

    def request_ended(self, answer: Any, seconds: float) -> None:
        """Its answer is here, or None, after `seconds`. An engine's says when what was computed."""
        self._under_way -= 1
        if not self._under_way:
            self._busy += time.perf_counter() - self._since
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(meta, dict):
            return
        prefill = max(0.0, meta.get("prefill_finished_time", 0.0) - meta.get("forward_entry_time", 0.0))
        decode = max(0.0, meta.get("e2e_latency", seconds) - meta.get("queue_time", 0.0) - prefill)
        self.prefill += prefill
        self.decode += decode
        self.queue += max(0.0, seconds - prefill - decode)

    def write_to(self, samples: Sequence[Sample], waited: float) -> None:
        """Add to the seconds of a rollout's samples; it waited so long before it was begun."""
        generate = time.perf_counter() - self._began
        tool = max(0.0, generate - self._busy)
        for sample in samples:
            sample.generate_seconds += generate
            sample.queue_seconds += waited + self.queue
            sample.prefill_seconds += self.prefill
            sample.decode_seconds += self.decode
            sample.non_generation_time = sample.non_generation_time or tool  # a function may know better


def start() -> RequestTimes:
    """A clock for the rollout that this task generates now: the requests of the task, and of those it starts."""
    times = RequestTimes()
    _current.set(times)
    return times


def current() -> RequestTimes | None:
    """The clock of the rollout that is being generated here, if any."""
    return _current.get()
