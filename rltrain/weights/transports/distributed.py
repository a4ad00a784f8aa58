"""The transport `distributed`: broadcasts over the network, in process groups of one trainer rank and one engine.

A group of several engines would hang for all of them when one dies.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from rltrain.weights.buckets import Chunk
from rltrain.weights.sources import (
    GROUP_TIMEOUT,
    Group,
    Reader,
    Source,
    broadcast,
    group_name,
    join_group,
    kept_buffer,
    open_store,
)


class EngineGroups:
    """The process groups of this rank: one with all ranks of each engine, which join it when they are told of it."""

    def __init__(self, host: str, backend: str, rank: int) -> None:
        """Engines join at this machine's address `host`; this is the trainer's `rank`."""
        self._name, self._store = f"weights-{uuid.uuid4().hex}", open_store(host, GROUP_TIMEOUT)
        self._host, self._backend, self._rank = host, backend, rank
        # By the engine's name. A group needs its store as long as it lives.
        self._groups: dict[str, tuple[dist.ProcessGroup, dist.Store]] = {}

    def source(self, chunks: Sequence[Chunk]) -> Source:
        """The announcement of broadcasts to the ranks of every engine."""
        ends = [(chunk.start, chunk.start + len(chunk.data)) for chunk in chunks]
        return Group(self._host, self._store.port, self._name, self._backend, self._rank, ends)

    def broadcast(self, engine: Reader, chunks: Sequence[Chunk]) -> None:
        """Send them to all ranks of an engine."""
        if engine.engine not in self._groups:
            name = group_name(self._name, engine.engine)
            # A connection of its own: one that waits for an engine holds up all who use it, and engines join the
            # groups of several senders in different orders, so that all of them could wait for each other.
            store = dist.TCPStore(self._host, self._store.port, is_master=False, timeout=GROUP_TIMEOUT)
            group = join_group(store, name, 0, 1 + engine.size, self._backend)
            self._groups[engine.engine] = group, store
        broadcast([chunk.data for chunk in chunks], self._groups[engine.engine][0])

    def forget(self, engine: str) -> None:
        """Give up the group with an engine, if there is one."""
        self._groups.pop(engine, None)


class DistributedTransport:
    """See `rltrain.weights.rounds.Transport`. Keeps one group per engine, from the first push to it on."""

    slots = 2
    sends = True

    def __init__(self, host: str, backend: str, rank: int) -> None:
        """Engines join at this machine's address `host`; this is the trainer's `rank`."""
        self._host, self._backend, self._rank = host, backend, rank
        self.in_order = backend == "nccl"
        self.in_place = backend == "gloo"
        self._groups: EngineGroups | None = None  # a rank that never sends needs none
        self._engines: dict[str, Reader] = {}
        self._buffers: dict[int, Tensor] = {}

    def connect(self, engines: Mapping[str, Reader]) -> None:
        """See `Transport.connect`."""
        self._engines |= engines

    def buffer(self, slot: int, nbytes: int) -> Tensor:
        """See `Transport.buffer`."""
        return kept_buffer(self._buffers, slot, nbytes, self._backend)

    def source(self, slot: int, chunks: Sequence[Chunk]) -> Source:
        """See `Transport.source`."""
        if self._groups is None:
            self._groups = EngineGroups(self._host, self._backend, self._rank)
        return self._groups.source(chunks)

    def send(self, chunks: Sequence[Chunk], url: str) -> None:
        """See `Transport.send`."""
        assert self._groups is not None, "the engines do not know it"
        self._groups.broadcast(self._engines[url], chunks)

    def disconnect(self, urls: Iterable[str]) -> None:
        """See `Transport.disconnect`."""
        for url in urls:
            engine = self._engines.pop(url, None)
            if engine is not None and self._groups is not None:
                self._groups.forget(engine.engine)
