"""Signals as values that a loop reads, so that nothing happens in the middle of something else."""

from __future__ import annotations

import os
import signal
import socket
from types import FrameType, TracebackType
from typing import Any

from rltrain.run.processes import wait_readable

WARNING = signal.SIGUSR2  # of Slurm, that a job's time is nearly over
_WARNED = "SLURMLIME_WARNED"  # a variable that a batch script sets when the warning comes to it


def hold_warning() -> None:
    """From now on the warning waits for a `SignalPipe`; one that has come to the batch script, too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {WARNING})
    signal.signal(WARNING, _ignore)  # SIG_IGN would forget one that waits
    if os.environ.pop(_WARNED, None):
        os.kill(os.getpid(), WARNING)


def release_warning() -> None:
    """Let the warning come, which `hold_warning` has held."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {WARNING})


class SignalPipe:
    """While entered, the given signals (and SIGCHLD) only wake up `wait`. For the main thread.

    Signals that were blocked come as soon as it is entered, and are blocked again afterwards.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = (*signals, signal.SIGCHLD)
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_mask: set[signal.Signals | int] = set()

    def __enter__(self) -> SignalPipe:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _ignore) for number in self._signals}
        self._previous_mask = set(signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._previous_mask)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._reader.close()
        self._writer.close()

    def wait(self, timeout: float) -> list[signal.Signals]:
        """Signals that have come, in order, waiting at most `timeout` seconds for the first one.

        SIGCHLD ends the wait but is not listed.
        """
        if not wait_readable([self._reader], timeout):
            return []
        numbers = [signal.Signals(byte) for byte in self._reader.recv(4096)]
        return [number for number in numbers if number in self._signals and number != signal.SIGCHLD]


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler has to exist for the wake-up; the loop that waits does the rest."""
