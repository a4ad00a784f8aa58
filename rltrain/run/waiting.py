"""Waiting for an answer that takes long, unless something comes up that can't wait for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from enum import Enum, auto
from threading import Thread
from typing import TypeVar

from rltrain.run.role import Registry

T = TypeVar("T")

_ASK_SECONDS = 1.0  # between two looks


class Interrupted(Enum):
    """What came up before the answer was there."""

    STOP = auto()  # the job is asked to stop
    NEWCOMERS = auto()  # engines have come back, and can't help without weights


def unless_stopped(registry: Registry, call: Callable[[int], T], argument: int) -> T | None:
    """What `call(argument)` returns or raises; None if the job is asked to stop before that."""
    answer = answer_unless_interrupted(registry, ask(call, argument))
    return None if isinstance(answer, Interrupted) else answer


def ask(call: Callable[[int], T], argument: int) -> Future[T]:
    """Begin `call(argument)`, beside whatever this process does meanwhile."""
    answer: Future[T] = Future()
    # A daemon: a request that is no longer awaited must not keep this process alive.
    Thread(target=_fulfil, args=(answer, call, argument), daemon=True).start()
    return answer


def answer_unless_interrupted(
    registry: Registry, answer: Future[T], newcomers: Callable[[], bool] = lambda: False
) -> T | Interrupted:
    """The answer, or its error; or what came up before, after which it may be waited for again."""
    while not wait([answer], timeout=_ASK_SECONDS).done:
        if registry.stop_requested():
            return Interrupted.STOP
        if newcomers():
            return Interrupted.NEWCOMERS
    return answer.result()


def _fulfil(future: Future[T], call: Callable[[int], T], argument: int) -> None:
    try:
        future.set_result(call(argument))
    except BaseException as error:
        future.set_exception(error)
