"""How weights reach the engines: `--update-weight-transport` and `--update-weight-mode`."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from rltrain.runtime import RoleContext
from rltrain.weights.buckets import NamedTensor
from rltrain.weights.delta import Sent
from rltrain.weights.disk import DiskEngine, DiskTransport
from rltrain.weights.distributed import DistributedTransport
from rltrain.weights.proof import CheckedEngine
from rltrain.weights.tensor import TensorTransport
from rltrain.weights.update import FindEngines, Update


class Engine(DiskEngine, CheckedEngine, Protocol):
    """What is needed of `rltrain.sglang.engines.JobEngine`."""

    is_here: bool  # on this machine

    def has_died(self) -> bool:
        """Whether it is gone for good."""

    def expel(self, reason: str) -> object:
        """Have it ended, as it has not got the weights."""


class Transport(Protocol):
    """One way from the trainer to the engines; only rank 0 has use for it."""

    def push(self, update: Update, find_engines: FindEngines[Engine]) -> dict[str, str]:
        """Have every engine load the weights and report their version; requests that run go on with them.

        Returns:
            By URL, what went wrong with the engines that failed. They may have some of the new weights, and stay
            paused.
        """


class FullUpdates:
    """Every push has all weights."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def push(
        self, version: int, tensors: Iterable[NamedTensor], find_engines: FindEngines[Engine]
    ) -> dict[str, str]:
        """See `Transport.push`."""
        return self._transport.push(Update.of(version, tensors), find_engines)


class DeltaUpdates:
    """A push has what has changed since the one before, or all weights if an engine did not get that one."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._sent = Sent()
        self._keep = f"slurmlime-weights-{uuid.uuid4().hex}"
        self._version: int | None = None
        self._known: set[str] = set()  # URLs of engines that have what was sent last, which is this version

    def push(
        self, version: int, tensors: Iterable[NamedTensor], find_engines: FindEngines[Engine]
    ) -> dict[str, str]:
        """See `Transport.push`."""
        engines = list(find_engines())
        if all(engine.url in self._known for engine in engines):
            update = Update(version, self._sent.changes(tensors), is_whole=False)
        else:
            update = Update(version, self._sent.whole(tensors), keep=self._keep)
        failures = self._transport.push(update, lambda: engines)
        others = self._known if version == self._version else set()
        self._version, self._known = version, (others | {engine.url for engine in engines}) - failures.keys()
        return failures


class ChosenByLayout:
    """`auto`: shared memory where all engines are on this machine, else a process group with each.

    With `--colocate` on several machines it is files: NCCL can't have two processes of one GPU in a group, and with
    `--update-weight-mode delta` shared memory has nothing to save.
    """

    def __init__(self, args: argparse.Namespace, context: RoleContext) -> None:
        """Choose when the engines are known."""
        self._args, self._context = args, context
        self._transport: Transport | None = None

    def push(self, update: Update, find_engines: FindEngines[Engine]) -> dict[str, str]:
        """See `Transport.push`."""
        if self._transport is None:
            name = choose(self._args, [engine.is_here for engine in find_engines()])
            print(f"weights go to the engines by --update-weight-transport {name}", flush=True)
            self._transport = make_transport(name, self._args, self._context)
        return self._transport.push(update, find_engines)


def choose(args: argparse.Namespace, are_here: Sequence[bool]) -> str:
    """The transport for engines of which each is on this machine, or not."""
    if all(are_here) and args.update_weight_mode == "full":
        return "tensor"
    return "disk" if args.colocate else "distributed"


def make_transport(name: str, args: argparse.Namespace, context: RoleContext) -> Transport:
    """The one of this name."""
    size = args.update_weight_buffer_size
    if name == "distributed":
        backend = args.distributed_backend or ("nccl" if torch.cuda.is_available() else "gloo")
        return DistributedTransport(size, context.host, backend)
    if name == "tensor":
        return TensorTransport(size, context.host)
    if name == "disk":
        return DiskTransport(context.layout.weights, Path(args.hf_checkpoint), size, context.host)
    return ChosenByLayout(args, context)


def make_updates(args: argparse.Namespace, context: RoleContext) -> FullUpdates | DeltaUpdates:
    """The ones that the flags name."""
    transport = make_transport(args.update_weight_transport, args, context)
    return DeltaUpdates(transport) if args.update_weight_mode == "delta" else FullUpdates(transport)
