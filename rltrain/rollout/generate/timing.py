"""Where the time of a rollout goes: waiting, prefill and decode of its requests, tools, and a blocked event loop.

Generation functions have slime's signatures, which hold no clock. So the requests that are sent while a rollout is
generated find its clock in a context variable. Tasks that the function starts inherit it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Self

import numpy as np

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


def start_clock() -> RequestTimes:
    """A clock for the rollout that this task generates now: the requests of the task, and of those it starts."""
    times = RequestTimes()
    _current.set(times)
    return times


@contextlib.contextmanager
def counted_to(times: RequestTimes | None) -> Iterator[None]:
    """Requests in here count to this clock, whichever task sends them."""
    token = _current.set(times)
    try:
        yield
    finally:
        _current.reset(token)


def current_clock() -> RequestTimes | None:
    """The clock of the rollout that is being generated here, if any."""
    return _current.get()


_LAG_INTERVAL = 0.02  # seconds


class LoopLag:
    """Measures while entered: sleeps for a moment again and again, and notes how much too late it wakes up."""

    def __init__(self) -> None:
        self._lags: list[float] = []

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._measure())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def metrics(self) -> dict[str, float]:
        """Seconds: `perf/loop_lag_p99` and `perf/loop_lag_max`."""
        if not self._lags:
            return {}
        return {
            "perf/loop_lag_p99": float(np.percentile(self._lags, 99)),
            "perf/loop_lag_max": max(self._lags),
        }

    async def _measure(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + _LAG_INTERVAL
            await asyncio.sleep(_LAG_INTERVAL)
            self._lags.append(max(0.0, clock() - due))
