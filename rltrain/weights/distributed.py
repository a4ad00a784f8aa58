"""Weight updates over the network: broadcasts to each engine, in a process group with it alone.

One group over several engines would hang for all of them when one dies.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rltrain.weights.buckets import Part, in_buckets, lay_out, sample_digests, write
from rltrain.weights.session import Bucket, E, Session, give, stream, tell
from rltrain.weights.sources import GROUP_TIMEOUT, REPORT_BYTES, Group, device_of, join_group
from rltrain.weights.update import FindEngines, Update

_UNSEEN = "it does not say whether it has got the weights"


@dataclass(frozen=True)
class Filled:
    """A bucket, flat, where the group can send it from."""

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

    def sources(self, nbytes: int) -> list[Group]:
        """What the engine's ranks are told of a broadcast."""
        return [
            Group(self._host, self._store.port, self._name, self._size, rank, self._backend, nbytes)
            for rank in range(1, self._size)
        ]

    def broadcast(self, buffer: Tensor) -> list[str]:
        """Send it to all ranks; what they report."""
        if self._group is None:
            self._group = join_group(self._store, self._name, 0, self._size, self._backend)
        dist.broadcast(buffer, src=0, group=self._group)
        report = torch.zeros(REPORT_BYTES, dtype=torch.uint8, device=buffer.device)
        reports = []
        for rank in range(1, self._size):
            dist.recv(report, src=rank, group=self._group)
            reports.append(bytes(report.cpu().numpy()).rstrip(b"\0").decode(errors="replace"))
        return reports


class DistributedTransport:
    """Keeps one group an engine, from the first push to it on."""

    def __init__(self, bucket_bytes: int, host: str, backend: str) -> None:
        """Meet engines at this machine's address `host`."""
        self._bucket_bytes, self._host, self._backend = bucket_bytes, host, backend
        self._meetings: dict[str, Meeting] = {}
        self._buffers: dict[int, Tensor] = {}

    def push(self, update: Update, find_engines: FindEngines[E]) -> dict[str, str]:
        """See `rltrain.weights.update.Transport.push`."""
        session = Session(find_engines())
        if not session.engines:
            return {}
        session.each(self._meet)

        def fill(number: int, parts: Sequence[Part]) -> Filled:
            pieces = lay_out(parts)
            buffer = self._buffer(number % 2, pieces[-1].end)
            write(parts, pieces, buffer)
            keep = f"{update.keep}-{number}" if update.keep else None
            return Filled(buffer, Bucket(pieces, sample_digests(pieces, buffer), keep))

        def send(filled: Filled) -> None:
            session.each(lambda engine: give(engine, lambda: self._offer(engine, filled), _UNSEEN))

        with session.updating(update.version):
            stream(in_buckets(update.parts, self._bucket_bytes), fill, send)
        for url in session.failures:
            self._meetings.pop(url, None)
        return session.failures

    def _meet(self, engine: E) -> None:
        if engine.url not in self._meetings:
            self._meetings[engine.url] = Meeting(self._host, self._backend, engine.tensor_parallel_size())

    def _buffer(self, number: int, size: int) -> Tensor:
        """One of two, which are kept: fresh memory costs more than the copy."""
        kept = self._buffers.get(number)
        if kept is None or len(kept) < size:
            kept = torch.empty(size, dtype=torch.uint8, device=device_of(self._backend))
            self._buffers[number] = kept
        return kept[:size]

    def _offer(self, engine: E, filled: Filled) -> list[str]:
        meeting = self._meetings[engine.url]
        sources = meeting.sources(len(filled.buffer))
        return both(lambda: tell(engine, filled.bucket, sources), lambda: meeting.broadcast(filled.buffer))


def both(ask: Callable[[], object], send: Callable[[], list[str]]) -> list[str]:
    """What `send` returns, when both are done; one that fails must not leave us waiting for the other."""
    pool = ThreadPoolExecutor(2)
    try:
        sent = pool.submit(send)
        calls: list[Future[Any]] = [pool.submit(ask), sent]
        for call in wait(calls, return_when=FIRST_EXCEPTION).done:
            call.result()
        return sent.result()
    finally:
        pool.shutdown(wait=False)
