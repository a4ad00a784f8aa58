"""Threads that use the GPU of the thread that starts them, and the order of what two threads have it do.

CUDA's current device belongs to a host thread, and a new thread has device 0. Each thread also has a current stream:
what one thread enqueues does not wait for what another one has enqueued. Without a GPU all this does nothing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def thread_pool(count: int, *, own_streams: bool = False) -> ThreadPoolExecutor:
    """Threads that use the caller's GPU.

    Args:
        count: how many at most.
        own_streams: each has a stream of its own, so that its work runs beside the caller's; else the caller's.
    """
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(count)
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()

    def prepare() -> None:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device) if own_streams else stream)

    return ThreadPoolExecutor(count, initializer=prepare)


class Mark:
    """A place in the work that this thread has enqueued on its GPU."""

    def __init__(self) -> None:
        """The place is after all that is enqueued by now."""
        self._event = torch.cuda.Event() if torch.cuda.is_available() else None
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Have what the calling thread enqueues from now on run after that; the thread itself goes on."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


def finish_work() -> None:
    """Wait until the GPU has done all that this thread has enqueued."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
