"""How weights reach the engines: `--update-weight-transport`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Protocol

import torch

from rltrain.runtime import RoleContext
from rltrain.weights.disk import DiskEngine
from rltrain.weights.distributed import GroupMedium
from rltrain.weights.proof import CheckedEngine
from rltrain.weights.sharing import Medium
from rltrain.weights.tensor import MemoryMedium

# In host memory one bucket is filled while another is sent and a third loaded: larger ones leave less to do at the same
# time, and smaller ones cost more messages (measured with those of benchmarks/weight_transports.py).
_HOST_BUCKET_BYTES = 64 * 1024**2


class Engine(DiskEngine, CheckedEngine, Protocol):
    """What is needed of `rltrain.sglang.engines.JobEngine`."""

    is_here: bool  # on this machine

    def has_died(self) -> bool:
        """Whether it is gone for good."""

    def expel(self, reason: str) -> object:
        """Have it ended, as it has not got the weights."""


def choose(args: argparse.Namespace, are_here: Sequence[bool]) -> str:
    """The transport that `auto` is, for engines of which each is on this machine, or not.

    Shared memory where the trainer and all engines are on this machine, else process groups. With `--colocate` on
    several machines it is files, as NCCL can't have two processes of one GPU in a group; and shared memory has nothing
    to save with `--update-weight-mode delta`.
    """
    if args.update_weight_transport != "auto":
        return args.update_weight_transport
    if all(are_here) and args.actor_num_nodes == 1 and args.update_weight_mode == "full":
        return "tensor"
    return "disk" if args.colocate else "distributed"


def make_medium(transport: str, args: argparse.Namespace, context: RoleContext, rank: int) -> Medium:
    """That of a transport which is not `disk`, for a rank of the trainer."""
    if transport == "tensor":
        return MemoryMedium()
    return GroupMedium(context.host, _backend(args), rank)


def bucket_bytes(transport: str, args: argparse.Namespace) -> int:
    """Of a bucket: `--update-weight-buffer-size`, but not so much in host memory."""
    size = args.update_weight_buffer_size
    if transport == "distributed" and _backend(args) == "nccl":
        return size
    return min(size, _HOST_BUCKET_BYTES)


def _backend(args: argparse.Namespace) -> str:
    return args.distributed_backend or ("nccl" if torch.cuda.is_available() else "gloo")
