"""One push as the engines see it: they stand still, load bucket by bucket, and go on; those that fail are left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from rltrain.weights.buckets import Bucket, to_json
from rltrain.weights.line import Line, LineEngine
from rltrain.weights.receive import LOADED
from rltrain.weights.sources import Source, describe

T = TypeVar("T")

# A line holds the engine's scheduler up, which would be taken for hung if it never answered in between.
_LINE_SECONDS = 10.0


class SessionEngine(LineEngine, Protocol):
    """What is needed of `rltrain.sglang.adapter.HttpServerEngineAdapter`."""

    url: str

    def pause_generation(self) -> object:
        """Hold requests back; those that run keep their tokens and nothing that the old weights computed."""

    def begin_weight_update(self) -> object:
        """Make ready for new weights."""

    def end_weight_update(self) -> object:
        """Put the new weights into use."""

    def continue_generation(self) -> object:
        """Let requests go on."""


E = TypeVar("E", bound=SessionEngine)


class Session(Generic[E]):
    """The engines of one push.

    Attributes:
        engines: those that take part still.
        failures: by URL, what went wrong with those that do not. They stay paused, as some of their weights may be new
            and some old.
    """

    def __init__(self, engines: Sequence[E], version: int, host: str, ahead: bool = False) -> None:
        """For weights of this version; engines reach the trainer at this machine's address `host`.

        With `ahead` they receive the next bucket while they load one.
        """
        self.engines = list(engines)
        self.failures: dict[str, str] = {}
        self._version, self._host, self._ahead = version, host, ahead
        self._lines: dict[str, Line] = {}
        self._refused: dict[str, str] = {}

    def each(self, call: Callable[[E], object]) -> None:
        """Call for every engine at the same time, and wait for all; one that fails is left out from then on."""
        for engine, error in outcomes(self.engines, call):
            # No answer; a refusal, or torch's word for a lost connection.
            if isinstance(error, OSError | RuntimeError):
                self.leave_out(engine.url, f"{engine.url}: {error}")
            elif error is not None:
                raise error

    def begin(self) -> None:
        """Hold the engines still, and have them ready to be told of buckets."""
        self.each(lambda engine: engine.pause_generation())
        self.each(lambda engine: engine.begin_weight_update())
        self.each(self._open_line)

    def drop(self) -> None:
        """Close all lines, whatever the engines do."""
        for line in self._lines.values():
            line.drop()

    def end(self) -> None:
        """Have the engines go on, and report the version, when they have loaded all that they were told of."""
        self.each(lambda engine: self.await_reports(engine))
        self.each(lambda engine: self._lines[engine.url].hang_up())
        self.each(lambda engine: engine.end_weight_update())
        for engine in [engine for engine in self.engines if engine.url in self._refused]:
            self.leave_out(engine.url, self._refused[engine.url])
        self.each(lambda engine: engine.continue_generation())

    def refresh_line(self, engine: E) -> None:
        """Let an engine that is told of more breathe, if it has been held up for long."""
        line = self._lines[engine.url]
        if time.monotonic() - line.opened > _LINE_SECONDS:
            self.await_reports(engine)
            line.hang_up()
            self._open_line(engine)

    def tell(self, engine: E, bucket: Bucket, sources: Sequence[Source]) -> None:
        """Tell each rank of an engine where to read a bucket."""
        self._lines[engine.url].tell([to_json(bucket, describe(source)) for source in sources])

    def await_reports(self, engine: E, left: int = 0) -> None:
        """Wait until an engine has loaded, or can't load, all but `left` of the buckets that it was told of."""
        line = self._lines[engine.url]
        while line.pending > left:
            problem = next((report for report in line.reports() if report != LOADED), None)
            if problem is not None:
                self._refused.setdefault(engine.url, f"{engine.url}: {problem}")

    def leave_out(self, url: str, why: str) -> None:
        """Go on without an engine."""
        if url not in self.failures:
            self.failures[url] = why
            self.engines = [engine for engine in self.engines if engine.url != url]

    def _open_line(self, engine: E) -> None:
        self._lines[engine.url] = Line(engine, self._host, self._version, self._ahead)


def outcomes(engines: Sequence[T], call: Callable[[T], object]) -> list[tuple[T, BaseException | None]]:
    """Call for every engine at the same time; each with its error, if any."""
    if len(engines) == 1:  # a thread more would cost some milliseconds, as they take turns
        return [(engines[0], _error_of(call, engines[0]))]
    with ThreadPoolExecutor(max(1, len(engines))) as pool:
        calls = [pool.submit(call, engine) for engine in engines]
    return [(engine, called.exception()) for engine, called in zip(engines, calls, strict=True)]


def _error_of(call: Callable[[T], object], engine: T) -> BaseException | None:
    try:
        call(engine)
    except Exception as error:
        return error
    return None


def for_all(engines: Sequence[T], call: Callable[[T], object]) -> None:
    """Call for every engine at the same time, and wait for all; then raise the first error."""
    for _, error in outcomes(engines, call):
        if error is not None:
            raise error
