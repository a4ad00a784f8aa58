"""A push in which every rank of the trainer hands out its own share of the weights.

All ranks go through the same rounds. In each a rank fills one of its two buffers with a bucket, rank 0 tells the
engines of the buckets of all ranks, and every rank sends its own; meanwhile the next ones are filled.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from rltrain.weights.buckets import Bucket, Part, lay_out, sample_digests, write
from rltrain.weights.session import E, Session, outcomes
from rltrain.weights.sources import Source

T = TypeVar("T")


class Ranks(Protocol):
    """The trainer's ranks, which call these methods together.

    Attributes:
        number: which of them this is.
    """

    number: int

    def gather(self, value: T) -> list[T]:
        """The values of all, in their order, on rank 0; nothing elsewhere."""

    def tell(self, value: T) -> T:
        """Rank 0's value."""


class Medium(Protocol):
    """Where a rank has its two buffers, and how an engine gets what is in them.

    Attributes:
        sends: whether it is sent, so that an engine can load the bucket before meanwhile; else it is read in place.
    """

    sends: bool

    def meet(self, engines: Mapping[str, int]) -> None:
        """Make ready for engines, whose URLs and numbers of ranks these are."""

    def buffer(self, slot: int, nbytes: int) -> Tensor:
        """The first bytes of a buffer (uint8, flat)."""

    def sources(self, slot: int, nbytes: int, url: str) -> list[Source]:
        """Where each rank of an engine finds them."""

    def send(self, slot: int, nbytes: int, url: str) -> None:
        """Have an engine get them.

        Raises:
            RuntimeError: it has died.
        """

    def forget(self, urls: Iterable[str]) -> None:
        """These engines have failed."""


@dataclass(frozen=True)
class Filled:
    """A bucket in one of the buffers."""

    slot: int
    nbytes: int
    bucket: Bucket


@dataclass(frozen=True)
class Offer:
    """What a rank has to say in a round.

    Attributes:
        bucket: None if it has nothing this time.
        sources: of each engine's ranks, by the engine's URL.
        is_last: whether it will have nothing more.
        failures: engines that did not get what it sent in the round before.
    """

    bucket: Bucket | None
    sources: dict[str, list[Source]]
    is_last: bool
    failures: dict[str, str]


class Sharing(Generic[E]):
    """One an engine fleet and medium. Methods are called by all ranks together."""

    def __init__(self, medium: Medium, ranks: Ranks, host: str) -> None:
        """Engines reach us at this machine's address `host`."""
        self._medium, self._ranks, self._host = medium, ranks, host
        self._urls: list[str] = []  # of the engines that take part still
        self._failures: dict[str, str] = {}

    def push(
        self, version: int, engines: Sequence[E], rounds: Iterable[Sequence[Part]], keep: str | None = None
    ) -> dict[str, str]:
        """Have every engine load the weights and report their version; requests that run go on with them.

        Args:
            engines: asked for on rank 0 only.
            rounds: this rank's share; getting the next may need other ranks, each in the same round.
            keep: a name under which the engines are to keep what they get, because changes to it will be sent.

        Returns:
            By URL, what went wrong with the engines that failed. They may have some of the new weights, and stay
            paused.
        """
        session = Session(engines, version, self._host, ahead=self._medium.sends)
        sizes: dict[str, int] = {}
        session.each(lambda engine: sizes.update({engine.url: engine.tensor_parallel_size()}))
        sizes = self._ranks.tell(sizes)
        self._medium.meet(sizes)
        self._urls, self._failures = list(sizes), {}
        try:
            self._go_through(session, iter(rounds), keep)
            session.end()
        finally:
            session.drop()
        failures = self._ranks.tell(session.failures)
        self._medium.forget(failures)
        return failures

    def _go_through(self, session: Session[E], rounds: Iterator[Sequence[Part]], keep: str | None) -> None:
        with ThreadPoolExecutor(1) as sender:
            begun = sender.submit(session.begin)  # the first bucket is filled meanwhile
            going: Future[bool] | None = None
            for number in itertools.count():
                parts = next(rounds, None)
                filled = self._fill(number, parts, keep) if parts else None
                if going is not None:
                    begun.result()
                    if going.result():
                        return
                going = sender.submit(self._round, session, filled, parts is None)

    def _fill(self, number: int, parts: Sequence[Part], keep: str | None) -> Filled:
        slot, pieces = number % 2, lay_out(parts)
        nbytes = pieces[-1].end
        buffer = self._medium.buffer(slot, nbytes)
        write(parts, pieces, buffer)
        name = f"{keep}-{self._ranks.number}-{number}" if keep else None
        return Filled(slot, nbytes, Bucket(pieces, sample_digests(pieces, buffer), name))

    def _round(self, session: Session[E], filled: Filled | None, is_last: bool) -> bool:
        """Whether it was the last, in which nobody has anything."""
        offers = self._ranks.gather(self._offer(filled, is_last))
        for url, problem in [each for offer in offers for each in offer.failures.items()]:
            session.leave_out(url, problem)
        session.each(lambda engine: _tell(session, engine, offers))
        urls = [engine.url for engine in session.engines]
        self._urls, is_over = self._ranks.tell((urls, all(offer.is_last for offer in offers)))
        self._failures = self._send(filled) if filled else {}
        if self._medium.sends:
            count = sum(offer.bucket is not None for offer in offers)
            session.each(lambda engine: session.await_reports(engine, left=count))
        else:
            session.each(session.await_reports)
            self._ranks.tell(None)  # so nobody fills a buffer that is still read
        return is_over

    def _offer(self, filled: Filled | None, is_last: bool) -> Offer:
        if filled is None:
            return Offer(None, {}, is_last, self._failures)
        sources = {url: self._medium.sources(filled.slot, filled.nbytes, url) for url in self._urls}
        return Offer(filled.bucket, sources, is_last, self._failures)

    def _send(self, filled: Filled) -> dict[str, str]:
        sent = outcomes(self._urls, lambda url: self._medium.send(filled.slot, filled.nbytes, url))
        for _, error in sent:
            if error is not None and not isinstance(error, OSError | RuntimeError):
                raise error
        return {url: f"{url}: {error}" for url, error in sent if error is not None}


def _tell(session: Session[E], engine: E, offers: Sequence[Offer]) -> None:
    """Tell an engine of all buckets of a round. Each begins with another, so that all ranks have one to send to."""
    session.refresh_line(engine)
    first = session.engines.index(engine)
    for i in range(len(offers)):
        offer = offers[(first + i) % len(offers)]
        if offer.bucket is not None:
            session.tell(engine, offer.bucket, offer.sources[engine.url])
