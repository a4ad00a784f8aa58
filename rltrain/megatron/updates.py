"""What a push sends: all weights, a directory that all ranks write, or what has changed (`--update-weight-mode`)."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from rltrain.megatron.distributed import on_rank_0
from rltrain.runtime import RoleContext
from rltrain.weights.buckets import NamedTensor
from rltrain.weights.delta import Sent
from rltrain.weights.disk import Directories
from rltrain.weights.transport import Engine, Transport, make_transport
from rltrain.weights.update import FindEngines, Update


class Weights(Protocol):
    """What is needed of `rltrain.megatron.exporter.Exporter`; all ranks call its methods together."""

    def stream(self, consume: Callable[[Iterable[NamedTensor]], object]) -> None:
        """Have rank 0 consume them."""

    def write(self, directory: Path) -> None:
        """Write a Hugging Face directory."""


class Updates(Protocol):
    """What a push sends, and how; all ranks take part."""

    def push(self, version: int, weights: Weights, find_engines: FindEngines[Engine]) -> dict[str, str]:
        """See `rltrain.weights.transport.Transport.push`.

        Only rank 0 asks for the engines; on others nothing is returned.
        """


class WholeUpdates:
    """Every push has all weights."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def push(self, version: int, weights: Weights, find_engines: FindEngines[Engine]) -> dict[str, str]:
        """See `Updates.push`."""
        failures: dict[str, str] = {}
        weights.stream(
            lambda tensors: failures.update(self._transport.push(Update.of(version, tensors), find_engines))
        )
        return failures


class WrittenUpdates:
    """Every push is a Hugging Face directory, of which every rank writes its share."""

    def __init__(self, directories: Directories) -> None:
        self._directories = directories

    def push(self, version: int, weights: Weights, find_engines: FindEngines[Engine]) -> dict[str, str]:
        """See `Updates.push`."""
        weights.write(Path(on_rank_0(lambda: str(self._directories.make_room(version)))))
        failures: dict[str, str] = {}
        on_rank_0(lambda: failures.update(self._directories.push(version, find_engines)))
        return failures


class DeltaUpdates:
    """A push has what has changed since the one before, or all weights if an engine did not get that one."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._sent = Sent()
        self._keep = f"slurmlime-weights-{uuid.uuid4().hex}"
        self._version: int | None = None
        self._known: set[str] = set()  # URLs of engines that have what was sent last, which is this version

    def push(self, version: int, weights: Weights, find_engines: FindEngines[Engine]) -> dict[str, str]:
        """See `Updates.push`."""
        failures: dict[str, str] = {}
        weights.stream(lambda tensors: failures.update(self._send(version, tensors, find_engines())))
        return failures

    def _send(
        self, version: int, tensors: Iterable[NamedTensor], engines: Sequence[Engine]
    ) -> dict[str, str]:
        if all(engine.url in self._known for engine in engines):
            update = Update(version, self._sent.changes(tensors))
        else:
            update = Update(version, self._sent.whole(tensors), self._keep)
        failures = self._transport.push(update, lambda: engines)
        others = self._known if version == self._version else set()
        self._version, self._known = version, (others | {engine.url for engine in engines}) - failures.keys()
        return failures


def make_updates(transport: str, args: argparse.Namespace, context: RoleContext) -> Updates:
    """Those that the flags name, by the transport of this name."""
    if args.update_weight_mode == "delta":
        return DeltaUpdates(make_transport(transport, args, context))
    if transport == "disk":
        return WrittenUpdates(Directories(context.layout.weights, context.host))
    return WholeUpdates(make_transport(transport, args, context))
