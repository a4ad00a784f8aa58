"""Signals as values that a loop reads, so that nothing happens in the middle of something else."""

from __future__ import annotations

import signal
import socket
from types import FrameType, TracebackType
from typing import Any

from rltrain.run.processes import wait_readable


class SignalPipe:
    """While entered, the given signals (and SIGCHLD) only wake up `wait`. For the main thread."""

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = (*signals, signal.SIGCHLD)
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalPipe:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _ignore) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
