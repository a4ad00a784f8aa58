"""Weight updates on one machine: the trainer fills shared memory bucket by bucket, and engines copy from there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rltrain.weights.buckets import Bucket, Part, in_buckets, lay_out, sample_digests, write
from rltrain.weights.session import E, Session, stream
from rltrain.weights.sources import Memory
from rltrain.weights.update import FindEngines, Update


class SharedMemory:
    """Memory without a name that other processes of this user can map as long as we live."""

    def __init__(self) -> None:
        self.name = f"slurmlime-weights-{uuid.uuid4().hex}"
        self._descriptor = os.memfd_create(self.name, os.MFD_CLOEXEC)
        self.buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def source(self) -> Memory:
        """Where others find it."""
        return Memory(f"/proc/{os.getpid()}/fd/{self._descriptor}", self.name, len(self.buffer))

    def grow(self, size: int) -> None:
        """Have room for `size` bytes."""
        if size > len(self.buffer):
            os.ftruncate(self._descriptor, size)
            self.buffer = torch.from_file(self.source.path, shared=True, size=size, dtype=torch.uint8)

    def close(self) -> None:
        """Give the memory back once nobody has it mapped."""
        self.buffer = torch.empty(0, dtype=torch.uint8)
        os.close(self._descriptor)


@dataclass(frozen=True)
class Filled:
    """A bucket in shared memory."""

    memory: SharedMemory
    bucket: Bucket


class TensorTransport:
    """Two buckets of shared memory: one is filled while the engines load the other."""

    def __init__(self, bucket_bytes: int, host: str) -> None:
        """Engines reach us at this machine's address `host`."""
        self._bucket_bytes, self._host = bucket_bytes, host
        self._memory: list[SharedMemory] = []

    def push(self, update: Update, find_engines: FindEngines[E]) -> dict[str, str]:
        """See `rltrain.weights.transport.Transport.push`."""
        session = Session(find_engines(), update.version, self._host)
        if not session.engines:
            return {}
        if not self._memory:
            self._memory = [SharedMemory(), SharedMemory()]

        def fill(number: int, parts: Sequence[Part]) -> Filled:
            memory, pieces = self._memory[number % 2], lay_out(parts)
            memory.grow(pieces[-1].end)
            write(parts, pieces, memory.buffer)
            return Filled(memory, Bucket(pieces, sample_digests(pieces, memory.buffer)))

        def send(filled: Filled) -> None:
            source = filled.memory.source
            session.each(lambda engine: session.tell(engine, filled.bucket, lambda rank: source))
            session.each(session.await_reports)

        with session.updating():
            stream(in_buckets(update.parts, self._bucket_bytes), fill, send)
        return session.failures

    def close(self) -> None:
        """Give the memory back."""
        while self._memory:
            self._memory.pop().close()
