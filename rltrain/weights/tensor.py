"""Weight updates on one machine: the trainer fills shared memory bucket by bucket, and engines copy from there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rltrain.weights.buckets import Part, in_buckets, lay_out, sample_digests, write
from rltrain.weights.session import Bucket, E, Session, give, stream, tell
from rltrain.weights.sources import REPORT_BYTES, Memory
from rltrain.weights.update import FindEngines, Update

_UNSEEN = (
    "it does not see the trainer's shared memory. --update-weight-transport tensor is for engines on the trainer's"
    " machine that were started by this job: take distributed or disk"
)


class SharedMemory:
    """Memory without a name that other processes of this user can map as long as we live."""

    def __init__(self) -> None:
        self.name = f"slurmlime-weights-{uuid.uuid4().hex}"
        self._descriptor = os.memfd_create(self.name, os.MFD_CLOEXEC)
        self.buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def path(self) -> str:
        """Where others find it."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def grow(self, size: int) -> None:
        """Have room for `size` bytes."""
        if size > len(self.buffer):
            os.ftruncate(self._descriptor, size)
            self.buffer = torch.from_file(self.path, shared=True, size=size, dtype=torch.uint8)

    def close(self) -> None:
        """Give the memory back once nobody has it mapped."""
        self.buffer = torch.empty(0, dtype=torch.uint8)
        os.close(self._descriptor)


@dataclass(frozen=True)
class Filled:
    """A bucket in shared memory."""

    memory: SharedMemory
    bucket: Bucket

    def offer(self, engine: E, readers: range) -> list[str]:
        """Have an engine load it; what its ranks report."""
        memory = self.memory
        memory.buffer[readers.start * REPORT_BYTES : readers.stop * REPORT_BYTES] = 0
        tell(
            engine,
            self.bucket,
            [Memory(memory.path, memory.name, len(memory.buffer), reader) for reader in readers],
        )
        return [read_report(memory, reader) for reader in readers]


class TensorTransport:
    """Two buckets of shared memory: one is filled while the engines load the other."""

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._memory: list[SharedMemory] = []

    def push(self, update: Update, find_engines: FindEngines[E]) -> dict[str, str]:
        """See `rltrain.weights.update.Transport.push`."""
        session = Session(find_engines())
        if not session.engines:
            return {}
        if not self._memory:
            self._memory = [SharedMemory(), SharedMemory()]
        readers = _readers(session)
        total = sum(map(len, readers.values()))

        def fill(number: int, parts: Sequence[Part]) -> Filled:
            memory = self._memory[number % 2]
            pieces = lay_out(parts, start=REPORT_BYTES * total)
            memory.grow(pieces[-1].end)
            write(parts, pieces, memory.buffer)
            return Filled(memory, Bucket(pieces, sample_digests(pieces, memory.buffer)))

        def send(filled: Filled) -> None:
            session.each(
                lambda engine: give(engine, lambda: filled.offer(engine, readers[engine.url]), _UNSEEN)
            )

        with session.updating(update.version):
            stream(in_buckets(update.parts, self._bucket_bytes), fill, send)
        return session.failures

    def close(self) -> None:
        """Give the memory back."""
        while self._memory:
            self._memory.pop().close()


def read_report(memory: SharedMemory, reader: int) -> str:
    """What a reader has reported; empty if nothing."""
    report = memory.buffer[REPORT_BYTES * reader : REPORT_BYTES * (reader + 1)]
    return bytes(report.numpy()).rstrip(b"\0").decode(errors="replace")


def _readers(session: Session[E]) -> dict[str, range]:
    """Every rank of every engine reads, and has a number."""
    sizes: dict[str, int] = {}
    session.each(lambda engine: sizes.update({engine.url: engine.tensor_parallel_size()}))
    ranges, start = {}, 0
    for url, size in sizes.items():
        ranges[url] = range(start, start + size)
        start += size
    return ranges
