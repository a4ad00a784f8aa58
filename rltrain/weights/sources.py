"""Where a rank of an engine reads a bucket: shared memory, a broadcast, or a file.

The trainer describes a source in JSON; the engine's rank reads it, inside SGLang.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from rltrain.run.processes import family_of
from rltrain.weights.page_lock import lock_pages, unlock_pages

GROUP_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Reader:
    """Who reads: a rank of an engine.

    Attributes:
        engine: a name that the trainer has given it; another one after it has failed.
        size: number of its ranks.
    """

    engine: str
    rank: int
    size: int


@dataclass(frozen=True)
class Memory:
    """The trainer's shared memory.

    Attributes:
        path: among the trainer's open files, because the memory has no path of its own.
        name: to recognise it by: on another machine the same path may be any file.
    """

    path: str
    name: str
    size: int

    def read(self, reader: Reader) -> Tensor:
        """The memory; it is mapped once and used again and again."""
        path = Path(self.path)
        if not path.is_symlink() or self.name not in path.readlink().name:
            raise FileNotFoundError(
                "the trainer's shared memory is not visible from here. --update-weight-transport tensor is for engines"
                " on the trainer's machine: use distributed or disk"
            )
        kept = _mapped.get(self.name)
        if kept is None or len(kept) < self.size:
            if kept is not None:
                unlock_pages(kept)
            kept = _mapped[self.name] = torch.from_file(
                self.path, shared=True, size=self.size, dtype=torch.uint8
            )
            lock_pages(kept)
        return kept


@dataclass(frozen=True)
class Group:
    """Broadcasts in a process group of one trainer rank and the ranks of one engine; the first joins the group.

    They are described alike to all engines.

    Attributes:
        name: of the sender's groups, see `group_name`.
        sender: the trainer's rank.
        chunks: of each broadcast the bytes of the bucket, from and to.
    """

    host: str
    port: int
    name: str
    backend: str
    sender: int
    chunks: Sequence[tuple[int, int]]

    def read(self, reader: Reader) -> Tensor:
        """What is broadcast, in memory that is kept: fresh memory costs more than the copy.

        It is good until the bucket after the next: one is loaded while the next is received.
        """
        buffer = kept_buffer(_buffers, next(_turns) % 2, self.chunks[-1][1], self.backend)
        broadcast([buffer[start:end] for start, end in self.chunks], self._group(reader))
        return buffer

    def _group(self, reader: Reader) -> dist.ProcessGroup:
        kept, name = _groups.get(self.sender), group_name(self.name, reader.engine)
        if kept is None or kept[0] != name:  # there is none yet, or the sender has given it up
            store = dist.TCPStore(self.host, self.port, is_master=False, timeout=GROUP_TIMEOUT)
            group = join_group(store, name, 1 + reader.rank, 1 + reader.size, self.backend)
            kept = _groups[self.sender] = (name, group, store)
        return kept[1]


@dataclass(frozen=True)
class File:
    """A file of a file system that the trainer sees too."""

    path: str
    size: int

    def read(self, reader: Reader) -> Tensor:
        """The file, mapped."""
        if not Path(self.path).exists():
            raise FileNotFoundError(
                f"{self.path} is not visible from here: is it on a file system that engines and trainer share?"
            )
        return torch.from_file(self.path, shared=False, size=self.size, dtype=torch.uint8)


Source = Memory | Group | File

_KINDS: dict[str, type[Source]] = {"memory": Memory, "group": Group, "file": File}
# By the trainer's rank. A group needs its store as long as it lives.
_groups: dict[int, tuple[str, dist.ProcessGroup, dist.Store]] = {}
_turns = itertools.count()
_buffers: dict[int, Tensor] = {}
_mapped: dict[str, Tensor] = {}  # the trainer's memory by name: three for each of its ranks, which only grow


def describe(source: Source) -> dict[str, Any]:
    """A source as a JSON object."""
    kind = next(kind for kind, each in _KINDS.items() if isinstance(source, each))
    return {"kind": kind, **asdict(source)}


def source_of(described: Mapping[str, Any]) -> Source:
    """The inverse of `describe`."""
    fields = dict(described)
    return _KINDS[fields.pop("kind")](**fields)


def group_name(sender: str, engine: str) -> str:
    """Name of the process group of a sender and an engine, which both of them know by a name."""
    return f"{sender}-{engine}"


def join_group(store: dist.Store, name: str, rank: int, world_size: int, backend: str) -> dist.ProcessGroup:
    """Join a group beside torch's default one, with processes that are not in that one."""
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


def broadcast(chunks: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Broadcast from rank 0, each chunk on its own; all are begun before one is waited for.

    One after the other they would take longer, as both ends agree on each before it is sent.

    Raises:
        RuntimeError: somebody in the group has died.
    """
    for begun in [dist.broadcast(chunk, src=0, group=group, async_op=True) for chunk in chunks]:
        if begun is not None:
            begun.wait()


def kept_buffer(kept: dict[int, Tensor], slot: int, size: int, backend: str) -> Tensor:
    """The first `size` bytes of the buffer that is kept for a slot, on the device that this backend sends from."""
    buffer = kept.get(slot)
    if buffer is None or len(buffer) < size:
        device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else "cpu"
        buffer = kept[slot] = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer[:size]


def open_store(host: str, timeout: timedelta, world_size: int | None = None) -> dist.TCPStore:
    """A store for a process group, which listens at the address `host` only.

    Bound here and handed over: the store would listen on every interface by itself.
    """
    listener = socket.create_server((host, 0), family=family_of(host))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
