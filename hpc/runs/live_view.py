"""Show a run while it runs: a live panel on a terminal, one line a step elsewhere.

`follow` shows a run while its Slurm job waits and runs. The job goes on whether anybody looks or not.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

from hpc.runs.progress import Record, RunFeed, RunState, read_status
from hpc.signals import SignalPipe
from hpc.slurm.client import JobStatus, SlurmClient, SlurmUnavailableError, status_of
from hpc.slurm.states import JobState
from rltrain.run.layout import RunLayout
from rltrain.run.terminal import safe_text, visible

if TYPE_CHECKING:
    from rich.console import RenderableType

_BARS = "▁▂▃▄▅▆▇█"
_REFRESH_SECONDS = 0.5
_ASK_SECONDS = 2.0  # between two questions to Slurm at first
_MAX_ASK_SECONDS = 30.0
# A requeued job is seen as ended for a moment.
_SETTLE_SECONDS = 5.0
_ENDS = ("finished", "stopped", "failed")


class View(Protocol):
    """Something that shows a run; enter it while the job runs."""

    def refresh(self) -> None:
        """Look for news and show them."""

    def say(self, text: str) -> None:
        """Show a message that stays."""

    def shown(self) -> AbstractContextManager[object]:
        """The period while the view is on the screen."""


def make_view(layout: RunLayout, num_rollout: int) -> View:
    """A panel if the output is a terminal, else plain lines."""
    return LiveView(layout, num_rollout) if sys.stdout.isatty() else PlainView(layout, num_rollout)


class PlainView:
    """One line a step, and one for each event that a reader of a log file wants to know of."""

    def __init__(self, layout: RunLayout, num_rollout: int) -> None:
        self._feed, self._num_rollout, self._begun = RunFeed(layout), num_rollout, time.monotonic()
        self._feed.poll()  # what earlier attempts did is not news

    def refresh(self) -> None:
        """Print what is new."""
        metrics, events = self._feed.poll()
        for event in events:
            if text := describe_event(event):
                self.say(text)
        for record in metrics:
            self.say(describe_step(record, self._num_rollout, self._feed.state))

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{time.monotonic() - self._begun:5.0f} s] {safe_text(text)}", flush=True)

    def shown(self) -> AbstractContextManager[object]:
        """Nothing to set up."""
        return nullcontext()


class LiveView:
    """A panel that is redrawn in place: phase, progress, rewards, roles."""

    def __init__(self, layout: RunLayout, num_rollout: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._name, self._feed, self._num_rollout = layout.name, RunFeed(layout), num_rollout
        self._console, self._begun = Console(), time.monotonic()
        self._live = Live(console=self._console, auto_refresh=False)

    def refresh(self) -> None:
        """Draw what the files say now."""
        self._feed.poll()
        elapsed = time.monotonic() - self._begun
        self._live.update(panel(self._name, self._feed.state, self._num_rollout, elapsed), refresh=True)

    def say(self, text: str) -> None:
        """Print a line above the panel."""
        self._console.print(safe_text(text), highlight=False, markup=False)

    def shown(self) -> AbstractContextManager[object]:
        """Draws from entry to exit; the last state stays on the screen."""
        return self._live


def describe_event(event: Record) -> str | None:
    """A line for an event, or None for one that a reader of a log need not see."""
    who = f"{event.get('role')}-{event.get('index')}"
    return {
        "attempt_started": f"attempt {event.get('attempt')} started",
        "role_started": f"{who} is started again" if event.get("restarts") else None,
        "role_ready": f"{who} is ready",
        "role_died": f"{who} died (exit code {event.get('exit_code')})",
        "checkpoint_saved": f"checkpoint saved after step {event.get('step', '?')}",
        "checkpoint_failed": f"checkpoint NOT saved after step {event.get('step', '?')}: {event.get('reason')}",
    }.get(event.get("kind", ""))


def describe_step(record: Record, num_rollout: int, state: RunState) -> str:
    """A line for a step: what it was, reward, evaluations, speed, time left."""
    done = record["step"] + 1
    of = f"step {done}/{num_rollout}" if num_rollout else f"weights of step {done}"
    parts = ["before training" if done == 0 else of]
    if "rollout/reward" in record:
        parts.append(f"reward {record['rollout/reward']:.3f}")
    elif (
        "train/loss" in record
    ):  # where rewards are normalised in groups, the policy's loss is 0 by construction
        parts.append(f"loss {record['train/loss']:.4f}")
    parts += [f"{name} {record[name]:.3f}" for name in state.eval_names if name in record]
    parts += lost_samples(record)
    if (speed := tokens_per_second(record)) is not None:
        parts.append(f"{speed:.0f} tokens/s")
    if "perf/step_s" in record:
        parts.append(f"{record['perf/step_s']:.1f} s")
    if record["step"] >= 0 and (left := state.seconds_left(num_rollout)):
        parts.append(f"{clock(left)} left")
    return "  ".join(parts)


def lost_samples(record: Record) -> list[str]:
    """Which part of a step's samples failed, or was cut off at the length limit, if any."""
    parts = [("rollout/failed_ratio", "failed"), ("rollout/truncated_ratio", "cut off")]
    return [f"{record[name]:.1%} {what}" for name, what in parts if record.get(name)]


def tokens_per_second(record: Record) -> float | None:
    """Of generation; where nothing is generated, of the whole step."""
    if "perf/tokens_per_s" in record:
        return record["perf/tokens_per_s"]
    if record.get("perf/step_s") and "rollout/tokens" in record:
        return record["rollout/tokens"] / record["perf/step_s"]
    return None


def panel(name: str, state: RunState, num_rollout: int, elapsed: float) -> RenderableType:
    """The panel of the live view."""
    from rich import box
    from rich.markup import escape
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    done = max([*state.metrics, -1]) + 1
    left = state.seconds_left(num_rollout)
    phase = state.status.get("phase", "starting")
    last = state.steps[-1] if state.steps else {}

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", justify="right")
    grid.add_column()
    grid.add_row("phase", f"[bold]{phase}[/]  (attempt {state.status.get('attempt', 0)})")
    if num_rollout:
        grid.add_row("step", f"{done}/{num_rollout}")
        grid.add_row("", ProgressBar(total=num_rollout, completed=done, width=40))
    grid.add_row("time", clock(elapsed) + (f", about {clock(left)} left" if left is not None else ""))
    goal = ("reward", "rollout/reward") if "rollout/reward" in last else ("loss", "train/loss")
    for label, metric in [goal, *((name, name) for name in state.eval_names)]:
        if values := state.series(metric):
            grid.add_row(label, f"{values[-1]:.3f}  {sparkline(values[-40:])}")
    if lost := lost_samples(last):
        grid.add_row("samples", f"[yellow]{', '.join(lost)}[/]")
    if (speed := tokens_per_second(last)) is not None:
        grid.add_row("tokens/s", f"{speed:.0f}")
    if state.unsaved:
        grid.add_row("checkpoint", f"[bold red]not saved[/]: {escape(visible(state.unsaved))}")
    colours = {"starting": "yellow", "ready": "green", "died": "red", "ended": "dim"}
    roles = (f"[{colours[what]}]{role} {what}[/]" for role, what in state.roles.items())
    grid.add_row("roles", "  ".join(roles))
    return Panel(grid, title=name, title_align="left", box=box.ROUNDED, expand=False)


def sparkline(values: list[float]) -> str:
    """A row of bars from the lowest to the highest value."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in values)


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds, or with hours before them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def follow(layout: RunLayout, job_id: str, view: View, client: SlurmClient) -> JobStatus | None:
    """Show the run until its job is over; returns how it ended, or None if the person stopped looking."""
    asker = _Asker(job_id, client)
    with SignalPipe(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals, view.shown():
        while True:
            if signals.wait(_REFRESH_SECONDS):
                view.refresh()
                return None
            view.refresh()
            if read_status(layout).get("phase") in _ENDS:
                asker.hurry()
            if text := asker.news():
                view.say(text)
            if asker.is_over:
                view.refresh()
                return asker.status


class _Asker:
    """Asks Slurm about a job, and less often the longer nothing changes."""

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

    def hurry(self) -> None:
        """Ask soon: the run's files say that something has changed."""
        self._wait, self._next = _ASK_SECONDS, min(self._next, time.monotonic() + _ASK_SECONDS)

    def news(self) -> str | None:
        """The changes since the last call, if there are any."""
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
