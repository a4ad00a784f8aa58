"""Where an engine's rank reads weights that the trainer offers, and how it answers. Runs inside SGLang.

The trainer describes a source to the rank, which makes it with `source_of`. All are free of exceptions that are not
caught in `rltrain.weights.receive`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

REPORT_BYTES = 512  # for each rank
GROUP_TIMEOUT = timedelta(minutes=10)


class Source(Protocol):
    """One bucket of weights, and the way back to the trainer."""

    def read(self) -> Tensor | None:
        """Its bytes (uint8, flat); None where it can't be seen from here."""

    def report(self, words: str) -> None:
        """Tell the trainer what became of it."""


@dataclass(frozen=True)
class Memory:
    """The trainer's shared memory; it begins with a place for every rank to report in.

    Attributes:
        path: of the memory, which has no name, among the trainer's open files.
        name: by which it is recognised: on another machine the same path may be any file.
        reader: this rank's number among all ranks of all engines.
    """

    path: str
    name: str
    size: int
    reader: int

    def read(self) -> Tensor | None:
        """The memory, mapped once, as it is used again and again."""
        path = Path(self.path)
        if not path.is_symlink() or self.name not in path.readlink().name:
            return None
        return _mapped(self.path, self.size)

    def report(self, words: str) -> None:
        """Into this rank's place."""
        data = words.encode()[:REPORT_BYTES]
        start = REPORT_BYTES * self.reader
        _mapped(self.path, self.size)[start : start + len(data)] = torch.frombuffer(
            bytearray(data), dtype=torch.uint8
        )


@dataclass(frozen=True)
class Group:
    """A broadcast in a process group of trainer rank 0 and the ranks of one engine; the first joins the group."""

    host: str
    port: int
    name: str
    world_size: int
    rank: int
    backend: str
    size: int

    def read(self) -> Tensor | None:
        """The broadcast, in memory that is kept: fresh memory costs more than the copy."""
        buffer = _kept(device_of(self.backend), self.size)
        dist.broadcast(buffer, src=0, group=self._group())
        return buffer

    def report(self, words: str) -> None:
        """A message of fixed length to rank 0."""
        data = words.encode()[:REPORT_BYTES].ljust(REPORT_BYTES, b"\0")
        message = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device_of(self.backend))
        dist.send(message, dst=0, group=self._group())

    def _group(self) -> dist.ProcessGroup:
        if self.name not in _groups:
            _groups.clear()  # of a trainer that has given it up
            store = dist.TCPStore(self.host, self.port, is_master=False, timeout=GROUP_TIMEOUT)
            group = join_group(store, self.name, self.rank, self.world_size, self.backend)
            _groups[self.name] = (group, store)
        return _groups[self.name][0]


@dataclass(frozen=True)
class File:
    """A file of a file system that the trainer sees too; the rank reports in a small file of its own."""

    path: str
    size: int
    reports: str

    def read(self) -> Tensor | None:
        """The file, mapped."""
        if not Path(self.path).exists():
            return None
        return torch.from_file(self.path, shared=False, size=self.size, dtype=torch.uint8)

    def report(self, words: str) -> None:
        """Complete as soon as it is there."""
        report, draft = Path(self.reports), Path(f"{self.reports}.{os.getpid()}")
        draft.write_text(words)
        draft.replace(report)


_KINDS: dict[str, type[Memory | Group | File]] = {"memory": Memory, "group": Group, "file": File}
_groups: dict[str, tuple[dist.ProcessGroup, dist.Store]] = {}  # the group needs the store as long as it lives
_buffers: dict[torch.device, Tensor] = {}


def describe(source: Memory | Group | File) -> dict[str, Any]:
    """A source as JSON can have it."""
    kind = next(kind for kind, each in _KINDS.items() if isinstance(source, each))
    return {"kind": kind, **asdict(source)}


def source_of(described: Mapping[str, Any]) -> Source:
    """The inverse of `describe`."""
    fields = dict(described)
    return _KINDS[fields.pop("kind")](**fields)


def device_of(backend: str) -> torch.device:
    """Where a group of this backend has its tensors."""
    if backend == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def join_group(store: dist.Store, name: str, rank: int, world_size: int, backend: str) -> dist.ProcessGroup:
    """Join a group beside torch's default one, of processes that have none in common."""
    group, _ = distributed_c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        backend,
        dist.PrefixStore(name, store),
        group_name=distributed_c10d.GroupName(name),
        timeout=GROUP_TIMEOUT,
    )
    distributed_c10d._world.pg_group_ranks[group] = {each: each for each in range(world_size)}
    return group


@lru_cache(maxsize=2)
def _mapped(path: str, size: int) -> Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def _kept(device: torch.device, size: int) -> Tensor:
    kept = _buffers.get(device)
    if kept is None or len(kept) < size:
        kept = _buffers[device] = torch.empty(size, dtype=torch.uint8, device=device)
    return kept[:size]
