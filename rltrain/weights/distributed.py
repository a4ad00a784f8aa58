"""Weight updates over the network: broadcasts to each engine, in a process group with it alone.

One group over several engines would hang for all of them when one dies.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from rltrain.weights.buckets import NamedTensor, Piece, in_buckets, lay_out, write
from rltrain.weights.session import SessionEngine, for_all, stream, updating

_TIMEOUT = timedelta(minutes=10)


class DistributedEngine(SessionEngine, Protocol):
    """What is needed of `rltrain.sglang.adapter.HttpServerEngineAdapter`."""

    url: str

    def tensor_parallel_size(self) -> int:
        """Number of its ranks."""

    def init_weights_update_group(
        self, host: str, port: int, world_size: int, name: str, backend: str
    ) -> object:
        """Join a process group with ranks 1 and up; returns when all are there."""

    def update_weights_from_distributed(
        self, pieces: Sequence[Piece], name: str, weight_version: str | None = None
    ) -> object:
        """Receive one broadcast; with a version, forget the cache and report that version."""


@dataclass(frozen=True)
class Group:
    """A process group of this rank and all ranks of one engine."""

    name: str
    handle: dist.ProcessGroup
    store: dist.Store  # the group needs it as long as it lives


class DistributedTransport:
    """Keeps one group an engine, from the first push to it on."""

    def __init__(self, bucket_bytes: int, host: str, backend: str) -> None:
        """Meet engines at this machine's address `host`."""
        self._bucket_bytes, self._host, self._backend = bucket_bytes, host, backend
        self._groups: dict[str, Group] = {}
        self._buffers: dict[int, Tensor] = {}

    def push(
        self,
        version: int,
        tensors: Iterable[NamedTensor],
        find_engines: Callable[[], Sequence[DistributedEngine]],
    ) -> None:
        """Have every engine load the tensors and report `version`; requests that run go on with them.

        Raises:
            HttpError: an engine failed. It has some of the new weights by then and stays paused.
        """
        engines = find_engines()
        if not engines:
            return
        for gone in self._groups.keys() - {engine.url for engine in engines}:
            del self._groups[gone]
        for_all([engine for engine in engines if engine.url not in self._groups], self._meet)

        def send(filled: tuple[Tensor, tuple[Piece, ...]]) -> None:
            for_all(engines, lambda engine: self._broadcast(engine, *filled))

        with updating(engines):
            stream(in_buckets(tensors, self._bucket_bytes), self._flatten, send)
            for_all(
                engines,
                lambda engine: engine.update_weights_from_distributed(
                    (), self._groups[engine.url].name, str(version)
                ),
            )

    def _flatten(self, number: int, bucket: Sequence[NamedTensor]) -> tuple[Tensor, tuple[Piece, ...]]:
        """The bucket in one of two buffers, which are kept: fresh memory costs more than the copy."""
        pieces = lay_out(bucket)
        size, device = pieces[-1].end, bucket[0][1].device
        kept = self._buffers.get(number)
        if kept is None or len(kept) < size or kept.device != device:
            kept = self._buffers[number] = torch.empty(size, dtype=torch.uint8, device=device)
        write(bucket, pieces, kept)
        return kept[:size], pieces

    def _meet(self, engine: DistributedEngine) -> None:
        """Form the group with an engine."""
        name, size = f"weights-{uuid.uuid4().hex}", 1 + engine.tensor_parallel_size()
        store = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        with ThreadPoolExecutor(1) as pool:
            joined = pool.submit(
                engine.init_weights_update_group, self._host, store.port, size, name, self._backend
            )
            handle = _join(store, name, size, self._backend)
            joined.result()
        self._groups[engine.url] = Group(name, handle, store)

    def _broadcast(self, engine: DistributedEngine, buffer: Tensor, pieces: tuple[Piece, ...]) -> None:
        """Send one bucket; an engine that refuses it must not leave us waiting in the broadcast."""
        group = self._groups[engine.url]
        pool = ThreadPoolExecutor(2)
        try:
            calls = [
                pool.submit(engine.update_weights_from_distributed, pieces, group.name),
                pool.submit(dist.broadcast, buffer, src=0, group=group.handle),
            ]
            done, _ = wait(calls, return_when=FIRST_EXCEPTION)
            for call in done:
                call.result()
        except BaseException:
            self._groups.pop(engine.url, None)
            raise
        finally:
            pool.shutdown(wait=False)


def _join(store: dist.Store, name: str, size: int, backend: str) -> dist.ProcessGroup:
    """Rank 0 of a group beside torch's default one, in the way in which SGLang makes the other ranks."""
    group, _ = distributed_c10d._new_process_group_helper(
        size,
        0,
        [],
        backend,
        dist.PrefixStore(name, store),
        group_name=distributed_c10d.GroupName(name),
        timeout=_TIMEOUT,
    )
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
