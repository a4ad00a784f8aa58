"""Waiting for an answer that takes long, unless the job is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

from rltrain.runtime import Registry

T = TypeVar("T")

_ASK_SECONDS = 1.0  # between two looks whether to stop


def unless_stopped(registry: Registry, call: Callable[[int], T], argument: int) -> T | None:
    """What `call(argument)` returns or raises; None if the job is asked to stop before that."""
    return answer_unless_stopped(registry, ask(call, argument))


def ask(call: Callable[[int], T], argument: int) -> Future[T]:
    """Begin `call(argument)`, beside whatever this process does meanwhile."""
    answer: Future[T] = Future()
    # A daemon: a request that nobody waits for any more must not keep this process alive.
    Thread(target=_fulfil, args=(answer, call, argument), daemon=True).start()
    return answer


def answer_unless_stopped(registry: Registry, answer: Future[T]) -> T | None:
    """The answer, or its error; None if the job is asked to stop before it is there."""
    while not wait([answer], timeout=_ASK_SECONDS).done:
        if registry.stop_requested():
            return None
    return answer.result()


def _fulfil(future: Future[T], call: Callable[[int], T], argument: int) -> None:
    try:
        future.set_result(call(argument))
    except BaseException as error:
        future.set_exception(error)
