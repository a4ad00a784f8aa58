"""Weight updates over the network: broadcasts to each engine, in a process group with it alone.

One group over several engines would hang for all of them when one dies.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from rltrain.weights.buckets import Bucket, Part, in_buckets, lay_out, sample_digests, write
from rltrain.weights.session import E, Session, stream
from rltrain.weights.sources import GROUP_TIMEOUT, Group, join_group, kept_buffer
from rltrain.weights.update import FindEngines, Update


@dataclass(frozen=True)
class Filled:
    """A bucket, flat, in one of two buffers, where the group can send it from."""

    slot: int
    buffer: Tensor
    bucket: Bucket


class Meeting:
    """The process group of this rank and all ranks of one engine, which join it when they are first told of it."""

    def __init__(self, host: str, backend: str, engine_ranks: int) -> None:
        """Meet at this machine's address `host`."""
        self._name, self._size = f"weights-{uuid.uuid4().hex}", 1 + engine_ranks
        self._host, self._backend = host, backend
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=GROUP_TIMEOUT)
        self._group: dist.ProcessGroup | None = None

    def source(self, rank: int, nbytes: int, slot: int) -> Group:
        """What a rank of the engine is told of a broadcast."""
        port, name = self._store.port, self._name
        return Group(self._host, port, name, self._size, 1 + rank, self._backend, nbytes, slot)

    def broadcast(self, buffer: Tensor) -> None:
        """Send it to all ranks."""
        if self._group is None:
            self._group = join_group(self._store, self._name, 0, self._size, self._backend)
        dist.broadcast(buffer, src=0, group=self._group)


class DistributedTransport:
    """Keeps one group an engine, from the first push to it on."""

    def __init__(self, bucket_bytes: int, host: str, backend: str) -> None:
        """Meet engines at this machine's address `host`."""
        self._bucket_bytes, self._host, self._backend = bucket_bytes, host, backend
        self._meetings: dict[str, Meeting] = {}
        self._buffers: dict[int, Tensor] = {}

    def push(self, update: Update, find_engines: FindEngines[E]) -> dict[str, str]:
        """See `rltrain.weights.transport.Transport.push`."""
        session = Session(find_engines(), update.version, self._host, ahead=True)
        if not session.engines:
            return {}
        session.each(self._meet)

        def fill(number: int, parts: Sequence[Part]) -> Filled:
            slot, pieces = number % 2, lay_out(parts)
            buffer = kept_buffer(self._buffers, slot, pieces[-1].end, self._backend)
            write(parts, pieces, buffer)
            keep = f"{update.keep}-{number}" if update.keep else None
            return Filled(slot, buffer, Bucket(pieces, sample_digests(pieces, buffer), keep))

        def send(filled: Filled) -> None:
            session.each(lambda engine: self._send(session, engine, filled))

        with session.updating():
            stream(in_buckets(update.parts, self._bucket_bytes), fill, send)
        for url in session.failures:
            self._meetings.pop(url, None)
        return session.failures

    def _meet(self, engine: E) -> None:
        if engine.url not in self._meetings:
            self._meetings[engine.url] = Meeting(self._host, self._backend, engine.tensor_parallel_size())

    def _send(self, session: Session[E], engine: E, filled: Filled) -> None:
        """Broadcast a bucket, while the engine still loads the one before."""
        meeting, nbytes = self._meetings[engine.url], len(filled.buffer)
        session.tell(engine, filled.bucket, lambda rank: meeting.source(rank, nbytes, filled.slot))
        meeting.broadcast(filled.buffer)
        session.await_reports(engine, left=1)
