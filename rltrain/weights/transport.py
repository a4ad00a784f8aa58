"""How weights reach the engines: `--update-weight-transport`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Protocol

import torch

from rltrain.runtime import RoleContext
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


def choose(args: argparse.Namespace, are_here: Sequence[bool]) -> str:
    """The transport that `auto` is, for engines of which each is on this machine, or not.

    Shared memory where all engines are on this machine, else a process group with each. With `--colocate` on several
    machines it is files, as NCCL can't have two processes of one GPU in a group; and shared memory has nothing to save
    with `--update-weight-mode delta`.
    """
    if args.update_weight_transport != "auto":
        return args.update_weight_transport
    if all(are_here) and args.update_weight_mode == "full":
        return "tensor"
    return "disk" if args.colocate else "distributed"


def make_transport(name: str, args: argparse.Namespace, context: RoleContext) -> Transport:
    """The one of this name."""
    size, host = args.update_weight_buffer_size, context.host
    if name == "tensor":
        return TensorTransport(size, host)
    if name == "disk":
        return DiskTransport(context.layout.weights, size, host)
    backend = args.distributed_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    return DistributedTransport(size, host, backend)
