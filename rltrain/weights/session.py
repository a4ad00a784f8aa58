"""One push as the engines see it: they are paused, load bucket by bucket, and go on; engines that fail are left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from rltrain.weights.channel import LOADED, Channel, Request
from rltrain.weights.cuda_threads import thread_pool
from rltrain.weights.engine import ServerEngine

T = TypeVar("T")

# A channel holds the engine's scheduler up. If it never answered in between, it would be taken for hung.
_CHANNEL_SECONDS = 10.0


class Session:
    """The engines of one push.

    Attributes:
        engines: those that still take part.
        failures: by URL, what went wrong with the others. They stay paused, because some of their weights may be new
            and some old.
    """

    def __init__(
        self,
        engines: Sequence[ServerEngine],
        version: int,
        host: str,
        ahead: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """For weights of this version; engines reach the trainer at this machine's address `host`.

        With `ahead` they receive the next bucket while they load the one before. `names` are what they are told that
        they are called, by URL.
        """
        self.engines = list(engines)
        self.failures: dict[str, str] = {}
        self._version, self._host, self._ahead = version, host, ahead
        self._names = names or {}
        self._channels: dict[str, Channel] = {}
        self._refused: dict[str, str] = {}

    def begin(self) -> None:
        """Pause the engines and open a channel to each."""
        self.each(lambda engine: self._open_channel(engine, engine.begin_push))

    def send(self, engine: ServerEngine, text: str) -> None:
        """Tell all ranks of an engine what is in a round of buckets, see `rltrain.weights.buckets.message`."""
        self._channels[engine.url].send(text)

    def confirm(self, engine: ServerEngine, left: int = 0) -> None:
        """Wait until an engine has reported on all but `left` of the rounds that it was told of."""
        channel = self._channels[engine.url]
        while channel.pending > left:
            problem = next((report for report in channel.receive_reports() if report != LOADED), None)
            if problem is not None:
                self._refused.setdefault(engine.url, f"{engine.url}: {problem}")

    def end(self) -> None:
        """Have the engines that have loaded every bucket go on, with the new version."""
        self.each(lambda engine: self.confirm(engine))
        self.each(lambda engine: self._channels[engine.url].close())
        self.each(
            lambda engine: (
                engine.end_weight_update()
                if engine.url in self._refused
                else engine.end_push(str(self._version))
            )
        )
        for engine in [engine for engine in self.engines if engine.url in self._refused]:
            self.leave_out(engine.url, self._refused[engine.url])

    def drop(self) -> None:
        """Close all channels, whatever the engines do."""
        for channel in self._channels.values():
            channel.drop()

    def each(self, call: Callable[[ServerEngine], object]) -> None:
        """Call for every engine at the same time, and wait for all; one that fails is left out from then on."""
        for engine, error in outcomes(self.engines, call):
            # No answer; a refusal, or torch's word for a lost connection.
            if isinstance(error, OSError | RuntimeError):
                self.leave_out(engine.url, f"{engine.url}: {error}")
            elif error is not None:
                raise error

    def leave_out(self, url: str, why: str) -> None:
        """Go on without an engine."""
        if url not in self.failures:
            self.failures[url] = why
            self.engines = [engine for engine in self.engines if engine.url != url]

    def refresh_channel(self, engine: ServerEngine) -> None:
        """Let an engine breathe before it is sent more, if its channel has been open for long."""
        channel = self._channels[engine.url]
        if time.monotonic() - channel.opened > _CHANNEL_SECONDS:
            self.confirm(engine)
            channel.close()
            self._open_channel(engine, engine.update_weights_from_tensor)

    def _open_channel(self, engine: ServerEngine, request: Request) -> None:
        name, size = self._names.get(engine.url, ""), engine.tensor_parallel_size()
        self._channels[engine.url] = Channel(request, self._host, self._ahead, name, size)


def outcomes(items: Sequence[T], call: Callable[[T], object]) -> list[tuple[T, BaseException | None]]:
    """Call for every item at the same time; each with its error, if any."""
    if len(items) == 1:  # another thread would cost some milliseconds, because the two take turns
        return [(items[0], _error_of(call, items[0]))]
    with thread_pool(max(1, len(items))) as pool:
        calls = [pool.submit(call, item) for item in items]
    return [(item, called.exception()) for item, called in zip(items, calls, strict=True)]


def _error_of(call: Callable[[T], object], item: T) -> BaseException | None:
    try:
        call(item)
    except Exception as error:
        return error
    return None


def for_all(items: Sequence[T], call: Callable[[T], object]) -> None:
    """Call for every item at the same time, and wait for all; then raise the first error."""
    for _, error in outcomes(items, call):
        if error is not None:
            raise error
