"""One push as the engines see it: they stand still, load bucket by bucket, and go on; those that fail are left out."""

from __future__ import annotations

import pickle
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from rltrain.sglang.adapter import WEIGHT_LOADER
from rltrain.weights.buckets import Piece, to_json
from rltrain.weights.receive import LOADED
from rltrain.weights.sources import File, Group, Memory, describe

B = TypeVar("B")
T = TypeVar("T")

_TRIES = 2  # of a bucket that an engine finds wrong


class SessionEngine(Protocol):
    """What is needed of `rltrain.sglang.adapter.HttpServerEngineAdapter`."""

    url: str

    def tensor_parallel_size(self) -> int:
        """Number of its ranks."""

    def pause_generation(self) -> object:
        """Hold requests back; those that run keep their tokens and nothing that the old weights computed."""

    def begin_weight_update(self) -> object:
        """Make ready for new weights."""

    def update_weights_from_tensor(
        self, payloads: Sequence[str], load_format: str, weight_version: str | None = None
    ) -> object:
        """Load what the payloads, one a rank, describe; with a version, forget the cache and report it."""

    def end_weight_update(self) -> object:
        """Put the new weights into use."""

    def continue_generation(self) -> object:
        """Let requests go on."""


E = TypeVar("E", bound=SessionEngine)


class WeightsRefusedError(RuntimeError):
    """An engine could not take the weights, or has others after a second try; names the tensor."""


@dataclass(frozen=True)
class Bucket:
    """Weights that are ready to be read by engines.

    Attributes:
        keep: name of the file in which the engines keep it, because changes to it will be sent; or None.
    """

    pieces: tuple[Piece, ...]
    digests: list[int]
    keep: str | None = None


class Session(Generic[E]):
    """The engines of one push.

    Attributes:
        failures: by URL, what went wrong with the engines that were left out. Their weights may be mixed, so they stay
            paused.
    """

    def __init__(self, engines: Sequence[E]) -> None:
        self.engines = list(engines)
        self.failures: dict[str, str] = {}

    def each(self, call: Callable[[E], object]) -> None:
        """Call for every engine at the same time, and wait for all; one that fails is left out from then on."""
        for engine, error in outcomes(self.engines, call):
            # No answer; a refusal, or torch's word for a lost connection.
            if isinstance(error, OSError | RuntimeError):
                self.failures[engine.url] = f"{error}"
                self.engines.remove(engine)
            elif error is not None:
                raise error

    @contextmanager
    def updating(self, version: int) -> Iterator[None]:
        """Hold the engines still for the length of the block, after which they report `version`."""
        self.each(lambda engine: engine.pause_generation())
        self.each(lambda engine: engine.begin_weight_update())
        yield
        done = _payload(to_json((), ()))
        self.each(
            lambda engine: engine.update_weights_from_tensor(
                [done] * engine.tensor_parallel_size(), WEIGHT_LOADER, str(version)
            )
        )
        self.each(lambda engine: engine.end_weight_update())
        self.each(lambda engine: engine.continue_generation())


def give(engine: SessionEngine, offer: Callable[[], Sequence[str]], unseen: str) -> None:
    """Have an engine load a bucket; if a rank finds something wrong, once more.

    Args:
        offer: does it, and returns what the ranks report.
        unseen: what it means if one reports nothing.

    Raises:
        WeightsRefusedError: it is wrong again; names the tensor.
    """
    for _ in range(_TRIES):
        problem = next((report for report in offer() if report != LOADED), None)
        if problem is None:
            return
    raise WeightsRefusedError(f"{engine.url}: {problem or unseen}")


def tell(engine: SessionEngine, bucket: Bucket, sources: Sequence[Memory | Group | File]) -> None:
    """Tell each rank of an engine where to read a bucket; returns when they have."""
    payloads = [
        _payload(to_json(bucket.pieces, bucket.digests, source=describe(source), keep=bucket.keep))
        for source in sources
    ]
    engine.update_weights_from_tensor(payloads, WEIGHT_LOADER)


def stream(buckets: Iterable[B], fill: Callable[[int, B], T], send: Callable[[T], None]) -> None:
    """Fill the next bucket while the one before is sent; `fill` is told which of them it is."""
    with ThreadPoolExecutor(1) as sender:
        sent: Future[None] | None = None
        for number, bucket in enumerate(buckets):
            filled = fill(number, bucket)
            if sent is not None:
                sent.result()
            sent = sender.submit(send, filled)
        if sent is not None:
            sent.result()


def outcomes(engines: Sequence[T], call: Callable[[T], object]) -> list[tuple[T, BaseException | None]]:
    """Call for every engine at the same time; each with its error, if any."""
    with ThreadPoolExecutor(max(1, len(engines))) as pool:
        calls = [pool.submit(call, engine) for engine in engines]
    return [(engine, called.exception()) for engine, called in zip(engines, calls, strict=True)]


def for_all(engines: Sequence[T], call: Callable[[T], object]) -> None:
    """Call for every engine at the same time, and wait for all; then raise the first error."""
    for _, error in outcomes(engines, call):
        if error is not None:
            raise error


def _payload(text: str) -> str:
    # SGLang wants pickled pairs of a name and a tensor.
    return b64encode(pickle.dumps([(text, Tensor())])).decode()
