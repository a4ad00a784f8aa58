"""What transports that change weights piece by piece have in common: engines that stand still meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

B = TypeVar("B")
T = TypeVar("T")


class SessionEngine(Protocol):
    """What is needed of `rltrain.sglang.adapter.HttpServerEngineAdapter`."""

    def pause_generation(self) -> object:
        """Hold requests back; those that run keep their tokens and nothing that the old weights computed."""

    def begin_weight_update(self) -> object:
        """Make ready for new weights."""

    def end_weight_update(self) -> object:
        """Put the new weights into use."""

    def continue_generation(self) -> object:
        """Let requests go on."""


@contextmanager
def updating(engines: Sequence[SessionEngine]) -> Iterator[None]:
    """Hold the engines still for the length of the block.

    If the block fails they stay paused: some of their weights are new and some old.
    """
    for_all(engines, lambda engine: engine.pause_generation())
    for_all(engines, lambda engine: engine.begin_weight_update())
    yield
    for_all(engines, lambda engine: engine.end_weight_update())
    for_all(engines, lambda engine: engine.continue_generation())


def for_all(engines: Sequence[T], call: Callable[[T], object]) -> None:
    """Call for every engine at the same time, and wait for all; then raise the first error."""
    with ThreadPoolExecutor(max(1, len(engines))) as pool:
        calls = [pool.submit(call, engine) for engine in engines]
    for finished in calls:
        finished.result()


def stream(buckets: Iterable[B], fill: Callable[[int, B], T], send: Callable[[T], None]) -> None:
    """Fill the next bucket while the one before is sent; `fill` gets the number of a buffer that is free."""
    with ThreadPoolExecutor(1) as sender:
        sent: Future[None] | None = None
        for number, bucket in enumerate(buckets):
            filled = fill(number % 2, bucket)
            if sent is not None:
                sent.result()
            sent = sender.submit(send, filled)
        if sent is not None:
            sent.result()
