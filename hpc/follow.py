"""Show a run while its Slurm job waits and runs. The job goes on whether anybody looks or not."""

from __future__ import annotations

import signal
import time

from hpc.layout import RunLayout
from hpc.signals import SignalPipe
from hpc.slurm.client import JobStatus, SlurmClient, SlurmUnavailableError, status_of
from hpc.slurm.states import JobState
from hpc.view import View

_REFRESH_SECONDS = 0.5
_ASK_SECONDS = 2.0  # between two questions to Slurm at first
_MAX_ASK_SECONDS = 30.0
# A requeued job is seen as ended for a moment.
_SETTLE_SECONDS = 5.0


def follow(layout: RunLayout, job_id: str, view: View, client: SlurmClient) -> JobStatus | None:
    """Show the run until its job is over; returns how it ended, or None if the person stopped looking."""
    asker = _Asker(job_id, client)
    with SignalPipe(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals, view.shown():
        while True:
            if signals.wait(_REFRESH_SECONDS):
                view.refresh()
                return None
            view.refresh()
            if text := asker.news():
                view.say(text)
            if asker.is_over:
                view.refresh()
                return asker.status


class _Asker:
    """Asks Slurm about a job, more and more seldom as long as nothing changes."""

    def __init__(self, job_id: str, client: SlurmClient) -> None:
        self._job_id, self._client = job_id, client
        self._wait, self._next, self._shown = _ASK_SECONDS, 0.0, ""
        self._final_since: float | None = None
        self.status: JobStatus | None = None

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, and stays so."""
        return self._final_since is not None and time.monotonic() - self._final_since > self._patience

    @property
    def _patience(self) -> float:
        settled = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)
        return 0.0 if self.status and self.status.state in settled else _SETTLE_SECONDS

    def news(self) -> str | None:
        """What has changed since the last call, if anything has."""
        if time.monotonic() < self._next:
            return None
        try:
            status = status_of(self._job_id, self._client.squeue([self._job_id]))
            if status.state is JobState.UNKNOWN:  # the controller has forgotten it
                status = self._client.poll([self._job_id])[self._job_id]
        except SlurmUnavailableError:
            self._next = time.monotonic() + self._wait
            return None
        is_over = status.state.is_final or status.state is JobState.UNKNOWN
        self._final_since = (self._final_since or time.monotonic()) if is_over else None
        self.status = status
        text = describe(status)
        self._wait = (
            _ASK_SECONDS if is_over or text != self._shown else min(self._wait * 1.5, _MAX_ASK_SECONDS)
        )
        self._next = time.monotonic() + self._wait
        changed, self._shown = text != self._shown, text
        return text if changed else None


def describe(status: JobStatus) -> str:
    """One line on a job's state."""
    text = f"job {status.job} is {status.state.lower()}"
    if status.state.is_waiting:
        starts = [record.expected_start for record in status.components if record.expected_start]
        text += f" ({status.reason})" if status.reason else ""
        text += f", expected to start at {max(starts).astimezone():%Y-%m-%d %H:%M}" if starts else ""
    elif status.state is JobState.RUNNING:
        text += f" on {', '.join(node for record in status.components for node in record.nodes)}"
    return text
