"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """Seconds of each phase of one step, as `perf/<phase>_s`; `perf/step_s` is the whole."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block as `phase`; several blocks of one phase add up."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - began

    def leave_out(self, seconds: float) -> None:
        """Do not count time that has passed (waiting for an evaluation) as part of the step."""
        self._began += seconds

    def stop_step(self) -> None:
        """End the step: what follows does not count as part of it."""
        self._seconds["step"] = time.perf_counter() - self._began

    def metrics(self) -> dict[str, float]:
        """`{"perf/<phase>_s": seconds}`."""
        return {f"perf/{phase}_s": seconds for phase, seconds in self._seconds.items()}
