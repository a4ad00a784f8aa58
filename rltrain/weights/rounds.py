"""A push in which every rank of the trainer sends its own share of the weights.

All ranks go through the same rounds. In each round a rank fills one of its buffers with a bucket, rank 0 tells the
engines of the buckets of all ranks, and every rank sends its own. The next buckets are filled meanwhile, so that an
engine knows of the next round when it has loaded one.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from rltrain.weights.buckets import (
    Bucket,
    Chunk,
    Part,
    lay_out,
    message,
    pack,
    sample_digests,
    to_json,
    write,
)
from rltrain.weights.cuda_threads import thread_pool
from rltrain.weights.engine import ServerEngine
from rltrain.weights.session import Session, outcomes
from rltrain.weights.sources import Reader, Source, describe

T = TypeVar("T")


class Ranks(Protocol):
    """The trainer's ranks, which call these methods together.

    Attributes:
        rank: which of them this is.
    """

    rank: int

    def gather(self, value: T) -> list[T]:
        """The values of all, in their order, on rank 0; nothing elsewhere."""

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""


class Transport(Protocol):
    """Where a rank has its buffers, and how an engine gets what is in them.

    Attributes:
        slots: number of the buffers: one is filled while another is sent; where engines read them in place, a third is
            loaded meanwhile.
        sends: whether a buffer is sent, so that an engine can load one bucket while it receives the next; otherwise
            engines read the buffer in place.
        in_order: whether what is sent waits in the queue of a GPU. With CUDA_DEVICE_MAX_CONNECTIONS=1 it has only one,
            and ranks that fill it in different orders wait for each other for ever.
        in_place: whether large tensors are sent from where they are in host memory, and not from a buffer.
    """

    slots: int
    sends: bool
    in_order: bool
    in_place: bool

    def connect(self, engines: Mapping[str, Reader]) -> None:
        """Make ready for these engines, given by their URLs."""

    def buffer(self, slot: int, nbytes: int) -> Tensor:
        """The first bytes of a buffer (uint8, flat)."""

    def source(self, slot: int, chunks: Sequence[Chunk]) -> Source:
        """Where every rank of every engine finds a bucket, which is these chunks.

        Told alike to all, it costs as little with many of them.
        """

    def send(self, chunks: Sequence[Chunk], url: str) -> None:
        """Have an engine get them.

        Raises:
            RuntimeError: it has died.
        """

    def disconnect(self, urls: Iterable[str]) -> None:
        """Forget these engines, which have failed."""


@dataclass(frozen=True)
class FilledBuffer:
    """A bucket in one of the buffers, or partly beside it."""

    slot: int
    chunks: Sequence[Chunk]
    bucket: Bucket


@dataclass(frozen=True)
class Offer:
    """What a rank has to say in a round.

    Attributes:
        bucket: and its source, as JSON; None if the rank has nothing this time.
        is_last: whether the rank will have nothing more.
        failures: engines that did not get what the rank sent in the round before.
    """

    bucket: str | None
    is_last: bool
    failures: dict[str, str]


class Rounds:
    """Sends shares by one transport. Methods are called by all ranks together."""

    def __init__(self, transport: Transport, ranks: Ranks, host: str) -> None:
        """Engines reach us at this machine's address `host`."""
        self._transport, self._ranks, self._host = transport, ranks, host
        self._names: dict[str, str] = {}  # of the engines that rank 0 has met; a failed one gets another
        self._places: dict[str, int] = {}  # by URL, of the engines that still take part
        self._senders: list[int] = []  # ranks that have a bucket in this round
        self._failures: dict[str, str] = {}

    def send(
        self,
        version: int,
        engines: Sequence[ServerEngine],
        rounds: Iterable[Sequence[Part]],
        keep: str | None = None,
    ) -> dict[str, str]:
        """Have every engine load the weights and report their version; running requests continue with them.

        Args:
            version: of the weights.
            engines: those of rank 0 count.
            rounds: this rank's share; getting the next may need other ranks, each in the same round.
            keep: a name under which the engines keep what they get, because changes to it will be sent.

        Returns:
            By URL, what went wrong with the engines that failed. They may have some of the new weights, and stay
            paused.
        """
        self._names |= {each.url: secrets.token_hex(4) for each in engines if each.url not in self._names}
        session = Session(engines, version, self._host, self._transport.sends, self._names)
        try:
            self._connect(session)
            self._go_through(session, iter(rounds), keep)
            session.end()
        finally:
            session.drop()
        failures = self._ranks.broadcast(session.failures)
        self._transport.disconnect(failures)
        self._names = {url: name for url, name in self._names.items() if url not in failures}
        return failures

    def _connect(self, session: Session) -> None:
        sizes: dict[str, int] = {}
        session.each(lambda engine: sizes.update({engine.url: engine.tensor_parallel_size()}))
        readers = {url: Reader(self._names[url], 0, size) for url, size in sizes.items()}
        self._transport.connect(self._ranks.broadcast(readers))
        self._failures = {}

    def _go_through(self, session: Session, rounds: Iterator[Sequence[Part]], keep: str | None) -> None:
        """Fill a buffer while the one before is sent; the first while the engines are being paused.

        In a GPU's queue what fills a buffer, which other ranks take part in, always comes after what is sent of the
        one before.
        """
        with thread_pool(1) as sender:
            begun = sender.submit(session.begin)
            going: Future[bool] | None = None
            for number in itertools.count():
                if going is not None and self._transport.in_order:
                    begun.result()
                    wait([going])
                parts = next(rounds, None)
                filled = self._fill(number, parts, keep) if parts else None
                if going is not None:
                    begun.result()
                    if going.result():
                        return
                going = sender.submit(self._round, session, filled, parts is None)

    def _fill(self, number: int, parts: Sequence[Part], keep: str | None) -> FilledBuffer:
        slot, pieces = number % self._transport.slots, lay_out(parts)
        nbytes = pieces[-1].end
        buffer = self._transport.buffer(slot, nbytes)
        name = f"{keep}-{self._ranks.rank}-{number}" if keep else None
        if self._transport.in_place:
            chunks, digests = pack(parts, pieces, buffer)
            return FilledBuffer(slot, chunks, Bucket(pieces, digests, name))
        write(parts, pieces, buffer)
        digests = sample_digests(pieces, buffer)
        return FilledBuffer(slot, [Chunk(0, buffer[:nbytes])], Bucket(pieces, digests, name))

    def _round(self, session: Session, filled: FilledBuffer | None, is_last: bool) -> bool:
        """Send the buckets of all ranks; returns whether this was the last round, in which no rank has a bucket."""
        offers = self._ranks.gather(self._offer(filled, is_last))
        for url, problem in [each for offer in offers for each in offer.failures.items()]:
            session.leave_out(url, problem)
        senders = [rank for rank, offer in enumerate(offers) if offer.bucket is not None]
        buckets = ", ".join(offer.bucket for offer in offers if offer.bucket is not None)
        # An engine that fails meanwhile must not move the others: they have been told in which order buckets come.
        places = {engine.url: place for place, engine in enumerate(session.engines)}
        if senders:
            session.each(lambda engine: _announce(session, engine, places[engine.url], buckets))
        left = {engine.url: places[engine.url] for engine in session.engines}
        self._places, self._senders, is_over = self._ranks.broadcast(
            (left, senders, all(offer.is_last for offer in offers))
        )
        self._failures = self._send_buffer(filled) if filled else {}
        session.each(lambda engine: session.confirm(engine, left=1 if senders else 0))
        if not self._transport.sends:
            self._ranks.broadcast(None)  # so that no buffer is filled while it is being read
        return is_over

    def _offer(self, filled: FilledBuffer | None, is_last: bool) -> Offer:
        if filled is None:
            return Offer(None, is_last, self._failures)
        source = describe(self._transport.source(filled.slot, filled.chunks))
        return Offer(to_json(filled.bucket, source), is_last, self._failures)

    def _send_buffer(self, filled: FilledBuffer) -> dict[str, str]:
        def send(url: str) -> None:
            self._transport.send(filled.chunks, url)

        if self._transport.in_order:
            urls = in_order(self._places, self._senders.index(self._ranks.rank), len(self._senders))
            sent = [each for url in urls for each in outcomes([url], send)]
        else:
            sent = outcomes(list(self._places), send)
        for _, error in sent:
            if error is not None and not isinstance(error, OSError | RuntimeError):
                raise error
        return {url: f"{url}: {error}" for url, error in sent if error is not None}


def in_order(places: Mapping[str, int], number: int, count: int) -> list[str]:
    """The engines, given with their places, in the order in which sender `number`, of `count`, sends to them.

    An engine takes the sender's bucket as number (number - place) modulo `count`, see
    `rltrain.weights.buckets.taken`. So nobody waits for
    somebody who has still to do what comes later.
    """
    return sorted(places, key=lambda engine: ((number - places[engine]) % count, places[engine]))


def _announce(session: Session, engine: ServerEngine, place: int, buckets: str) -> None:
    """Tell an engine of all buckets of a round."""
    session.refresh_channel(engine)
    session.send(engine, message(buckets, place))
