"""Whether an engine makes progress. `/health` answers from a process that computes nothing, so it tells little.

`/server_info` is asked instead, which the scheduler has to answer: it does so between two batches, while generation
is paused and while its memory is released, but not while it hangs. It does not answer while it loads weights either,
so it is given more time then. A process that somebody stopped can't be asked, but can be seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from rltrain.arguments.groups.engines import Engines
from rltrain.run.files import read_json
from rltrain.run.layout import RunLayout

LOADING_FACTOR = 10.0  # so much more time while the weights are exchanged
_TICK = 1.0  # seconds between two looks at the processes


@dataclass(frozen=True)
class HealthLimits:
    """Seconds; `--rollout-health-check-interval`, `-timeout` and `-first-wait`."""

    interval: float
    timeout: float
    first_wait: float = 0.0


def health_limits(engines: Engines) -> HealthLimits:
    """The limits that the flags name."""
    return HealthLimits(
        engines.rollout_health_check_interval,
        engines.rollout_health_check_timeout,
        engines.rollout_health_check_first_wait,
    )


class HungError(RuntimeError):
    """The engine is there, but has not made progress for too long; the message says what was seen."""


def watch(
    pid: int,
    probe: Callable[[float], bool],
    is_loading: Callable[[], bool],
    limits: HealthLimits,
    is_over: Callable[[], bool],
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Return when `is_over`, and not before.

    Args:
        pid: of the server; its descendants are looked at too.
        probe: whether the scheduler answered within so many seconds.
        is_loading: whether weights are being exchanged, so that the scheduler may be busy with them.
        limits: how often to ask, and how long to wait.
        is_over: whether the server has ended.
        tick: called about once a second.

    Raises:
        HungError: no progress for `limits.timeout` seconds (ten times as long while it loads weights).
    """
    due, silent_since = time.monotonic() + limits.first_wait, None
    while not is_over():
        tick()
        if time.monotonic() >= due:
            began, loading = time.monotonic(), is_loading()
            trouble = None if probe(limits.timeout) else "its scheduler has not answered"
            if stopped := stopped_process(pid):
                trouble = f"its process {stopped} has been stopped"
            silent_since = (silent_since or began) if trouble else None
            if silent_since is not None:
                silent = time.monotonic() - silent_since
                busy = not stopped and (loading or is_loading())
                allowed = limits.timeout * (LOADING_FACTOR if busy else 1.0)
                if silent >= allowed and not is_over():
                    raise HungError(f"{trouble} for {silent:.0f} s")
            due = time.monotonic() + (0.0 if trouble else limits.interval)
        time.sleep(min(_TICK, limits.interval))


def stopped_process(pid: int) -> str | None:
    """Name of a process of the server that is stopped (SIGSTOP, a debugger), or None."""
    try:
        server = psutil.Process(pid)
        for process in (server, *server.children(recursive=True)):
            if process.status() == psutil.STATUS_STOPPED:
                return f"{process.name()} (pid {process.pid})"
    except psutil.Error:
        pass  # it has ended, which is reported elsewhere
    return None


def is_loading(layout: RunLayout) -> bool:
    """Whether the engines are being given weights now."""
    try:
        return (read_json(layout.status) or {}).get("phase") == "weights"
    except OSError:
        return False
