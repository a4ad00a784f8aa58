"""Weight updates on one machine: the trainer fills shared memory bucket by bucket, and engines copy from there."""

from __future__ import annotations

import os
import pickle
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rltrain.sglang.adapter import SHARED_MEMORY_LOADER
from rltrain.weights.buckets import NamedTensor, Piece, in_buckets, lay_out, sample_digest, to_json, write
from rltrain.weights.receive import LOADED, REPORT_BYTES, read_report
from rltrain.weights.session import SessionEngine, for_all, stream, updating


class TensorEngine(SessionEngine, Protocol):
    """What is needed of `rltrain.sglang.adapter.HttpServerEngineAdapter`."""

    url: str

    def tensor_parallel_size(self) -> int:
        """Number of its ranks."""

    def update_weights_from_tensor(
        self, payloads: Sequence[str], load_format: str, weight_version: str | None = None
    ) -> object:
        """Load what the payloads, one a rank, describe; with a version, forget the cache and report it."""


class WeightsRefusedError(RuntimeError):
    """An engine could not take the weights."""


_UNREADABLE = (
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


class TensorTransport:
    """Two buckets of shared memory: one is filled while the engines load the other."""

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._memory: list[SharedMemory] = []

    def push(
        self,
        version: int,
        tensors: Iterable[NamedTensor],
        find_engines: Callable[[], Sequence[TensorEngine]],
    ) -> None:
        """Have every engine load the tensors and report `version`; requests that run go on with them.

        Raises:
            WeightsRefusedError, HttpError: an engine failed. It has some of the new weights by then and stays paused.
        """
        engines = find_engines()
        if not engines:
            return
        if not self._memory:
            self._memory = [SharedMemory(), SharedMemory()]
        readers = _readers(engines)
        with updating(engines):
            stream(
                in_buckets(tensors, self._bucket_bytes),
                lambda number, bucket: _fill(self._memory[number], bucket, sum(map(len, readers))),
                lambda filled: filled.send(engines, readers),
            )
            done = _payload(to_json((), ()))
            for_all(
                engines, lambda engine: _update(engine, [done] * engine.tensor_parallel_size(), str(version))
            )

    def close(self) -> None:
        """Give the memory back."""
        while self._memory:
            self._memory.pop().close()


@dataclass(frozen=True)
class Filled:
    """A bucket in shared memory."""

    memory: SharedMemory
    pieces: tuple[Piece, ...]
    digests: list[int]

    def send(self, engines: Sequence[TensorEngine], readers: list[range]) -> None:
        """Have all engines load it; one that reports something wrong is given it once more.

        Raises:
            WeightsRefusedError: it still does; names the engine and the tensor.
        """
        for_all(list(zip(engines, readers, strict=True)), lambda pair: self._send(*pair, tries=2))

    def _send(self, engine: TensorEngine, readers: range, tries: int) -> None:
        memory = self.memory
        for left in reversed(range(tries)):
            memory.buffer[readers.start * REPORT_BYTES : readers.stop * REPORT_BYTES] = 0
            fields = {"path": memory.path, "name": memory.name, "size": len(memory.buffer)}
            _update(
                engine,
                [_payload(to_json(self.pieces, self.digests, reader=reader, **fields)) for reader in readers],
            )
            reports = [read_report(memory.buffer, reader) for reader in readers]
            problem = next((report for report in reports if report != LOADED), None)
            if problem is None:
                return
            if not left:
                raise WeightsRefusedError(f"{engine.url}: {problem or _UNREADABLE}")


def _readers(engines: Sequence[TensorEngine]) -> list[range]:
    """Every rank of every engine reads, and has a number."""
    ranges, start = [], 0
    for engine in engines:
        ranges.append(range(start, start + engine.tensor_parallel_size()))
        start = ranges[-1].stop
    return ranges


def _fill(memory: SharedMemory, bucket: Sequence[NamedTensor], readers: int) -> Filled:
    pieces = lay_out(bucket, start=REPORT_BYTES * readers)
    memory.grow(pieces[-1].end)
    write(bucket, pieces, memory.buffer)
    return Filled(memory, pieces, [sample_digest(piece, memory.buffer) for piece in pieces])


def _payload(text: str) -> str:
    # SGLang wants pickled pairs of a name and a tensor.
    return b64encode(pickle.dumps([(text, Tensor())])).decode()


def _update(engine: TensorEngine, payloads: list[str], version: str | None = None) -> None:
    engine.update_weights_from_tensor(payloads, SHARED_MEMORY_LOADER, version)
