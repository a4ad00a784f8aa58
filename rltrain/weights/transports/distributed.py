"""The transport `distributed`: broadcasts over the network, in process groups of one trainer rank and one engine.

A group of several engines would hang for all of them when one dies.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping

import torch.distributed as dist
from torch import Tensor

from rltrain.weights.sources import GROUP_TIMEOUT, Group, Source, join_group, kept_buffer, open_store


class EngineGroup:
    """The process group of this rank and all ranks of one engine, which join it when they are first told of it."""

    def __init__(self, host: str, backend: str, rank: int, engine_ranks: int) -> None:
        """The engine joins at this machine's address `host`; this is the trainer's `rank`."""
        self._name, self._size = f"weights-{uuid.uuid4().hex}", 1 + engine_ranks
        self._host, self._backend, self._rank = host, backend, rank
        self._store = open_store(host, GROUP_TIMEOUT)
        self._group: dist.ProcessGroup | None = None

    def sources(self, nbytes: int) -> list[Source]:
        """What each rank of the engine is told of a broadcast."""
        port, name = self._store.port, self._name
        return [
            Group(self._host, port, name, self._size, number, self._backend, nbytes, self._rank)
            for number in range(1, self._size)
        ]

    def broadcast(self, buffer: Tensor) -> None:
        """Send it to all ranks."""
        if self._group is None:
            self._group = join_group(self._store, self._name, 0, self._size, self._backend)
        dist.broadcast(buffer, src=0, group=self._group)


class DistributedTransport:
    """See `rltrain.weights.rounds.Transport`. Keeps one group per engine, from the first push to it on."""

    sends = True

    def __init__(self, host: str, backend: str, rank: int) -> None:
        """Engines join at this machine's address `host`; this is the trainer's `rank`."""
        self._host, self._backend, self._rank = host, backend, rank
        self.in_order = backend == "nccl"
        self._groups: dict[str, EngineGroup] = {}
        self._buffers: dict[int, Tensor] = {}

    def connect(self, engines: Mapping[str, int]) -> None:
        """See `Transport.connect`."""
        for url, size in engines.items():
            if url not in self._groups:
                self._groups[url] = EngineGroup(self._host, self._backend, self._rank, size)

    def buffer(self, slot: int, nbytes: int) -> Tensor:
        """See `Transport.buffer`."""
        return kept_buffer(self._buffers, slot, nbytes, self._backend)

    def sources(self, slot: int, nbytes: int, url: str) -> list[Source]:
        """See `Transport.sources`."""
        return self._groups[url].sources(nbytes)

    def send(self, slot: int, nbytes: int, url: str) -> None:
        """See `Transport.send`."""
        self._groups[url].broadcast(self.buffer(slot, nbytes))

    def disconnect(self, urls: Iterable[str]) -> None:
        """See `Transport.disconnect`."""
        for url in urls:
            self._groups.pop(url, None)
