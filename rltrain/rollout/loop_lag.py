"""How long the event loop keeps others waiting: what blocks it delays every request of the rollout."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

import numpy as np

_INTERVAL = 0.02  # seconds


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
            due = clock() + _INTERVAL
            await asyncio.sleep(_INTERVAL)
            self._lags.append(max(0.0, clock() - due))
