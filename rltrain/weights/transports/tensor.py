"""The transport `tensor`, on one machine: the trainer's ranks fill shared memory, and engines copy from there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rltrain.weights.buckets import Chunk
from rltrain.weights.page_lock import lock_pages, unlock_pages
from rltrain.weights.sources import Memory, Reader, Source


class SharedMemory:
    """Anonymous memory that other processes of this user can map as long as we live."""

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
            unlock_pages(self.buffer)
            os.ftruncate(self._descriptor, size)
            self.buffer = torch.from_file(self.source.path, shared=True, size=size, dtype=torch.uint8)
            lock_pages(self.buffer)

    def close(self) -> None:
        """Free the memory once no process has it mapped."""
        unlock_pages(self.buffer)
        self.buffer = torch.empty(0, dtype=torch.uint8)
        os.close(self._descriptor)


class SharedMemoryTransport:
    """See `rltrain.weights.rounds.Transport`."""

    slots = 3
    sends = False
    in_order = False
    in_place = False

    def __init__(self) -> None:
        self._memory: list[SharedMemory] = []

    def connect(self, engines: Mapping[str, Reader]) -> None:
        """See `Transport.connect`."""
        if not self._memory:
            self._memory = [SharedMemory() for _ in range(self.slots)]

    def buffer(self, slot: int, nbytes: int) -> Tensor:
        """See `Transport.buffer`."""
        self._memory[slot].grow(nbytes)
        return self._memory[slot].buffer

    def source(self, slot: int, chunks: Sequence[Chunk]) -> Source:
        """See `Transport.source`."""
        return self._memory[slot].source

    def send(self, chunks: Sequence[Chunk], url: str) -> None:
        """Nothing: engines read it where it is."""

    def disconnect(self, urls: Iterable[str]) -> None:
        """Nothing is kept of an engine."""

    def close(self) -> None:
        """Give the memory back."""
        while self._memory:
            self._memory.pop().close()
