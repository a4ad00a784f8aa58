"""When has a run ended? Asked again and again by those who follow it, so it asks Slurm only now and then."""

from __future__ import annotations

import time

from hpc.layout import RunLayout
from hpc.lock import find_holder
from hpc.run_jobs import ask_slurm
from hpc.runs import read_run
from hpc.slurm.client import SlurmClient
from hpc.status import to_status

_SLURM_SECONDS = 10.0  # between two questions to Slurm
_PATIENCE_SECONDS = 10.0  # for a start: until its supervisor holds the lock


class RunEnd:
    """Tells whether a run has ended; a job that was requeued or waits in the queue has not."""

    def __init__(self, layout: RunLayout, client: SlurmClient | None = None) -> None:
        self._layout, self._client = layout, client
        self._next_question = 0.0
        self._active_in_slurm = False
        self._free_since = time.monotonic()

    def is_over(self, attempt: int | None = None) -> bool:
        """Whether the run has ended or, if an `attempt` is given, that one has."""
        if attempt is not None and max(self._layout.attempts(), default=attempt) > attempt:
            return True
        if find_holder(self._layout) is not None:
            self._free_since = time.monotonic()
            return False
        if self._is_active_in_slurm():
            return False
        record = read_run(self._layout)
        has_ended = record.state in ("finished", "stopped", "failed")
        return has_ended or time.monotonic() - self._free_since > _PATIENCE_SECONDS

    def _is_active_in_slurm(self) -> bool:
        if time.monotonic() >= self._next_question:
            self._next_question = time.monotonic() + _SLURM_SECONDS
            record = read_run(self._layout)
            slurm = ask_slurm(record.slurm_jobs, self._client)
            # Unknown is not over: Slurm may answer again in a minute.
            self._active_in_slurm = bool(slurm.problem) or to_status(record, slurm).is_active
        return self._active_in_slurm
