"""How weights reach the engines: `--update-weight-transport`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from rltrain.runtime import RoleContext
from rltrain.weights.buckets import NamedTensor
from rltrain.weights.disk import PushTarget, push_weights
from rltrain.weights.distributed import DistributedEngine, DistributedTransport
from rltrain.weights.proof import CheckedEngine
from rltrain.weights.tensor import TensorEngine, TensorTransport


class Engine(PushTarget, TensorEngine, DistributedEngine, CheckedEngine, Protocol):
    """What is needed of `rltrain.sglang.engines.JobEngine`."""


class Transport(Protocol):
    """One way from the trainer to the engines; only rank 0 has use for it."""

    def push(
        self,
        version: int,
        tensors: Iterable[NamedTensor],
        find_engines: Callable[[], Sequence[Engine]],
    ) -> object:
        """Have every engine load the tensors and report `version`; requests that run go on with them.

        Raises:
            HttpError: an engine failed.
        """


@dataclass(frozen=True)
class DiskTransport:
    """Through a directory of the run, which a restarted engine finds too."""

    root: Path
    template: Path

    def push(
        self,
        version: int,
        tensors: Iterable[NamedTensor],
        find_engines: Callable[[], Sequence[Engine]],
    ) -> None:
        """See `Transport.push`."""
        push_weights(self.root, version, tensors, self.template, find_engines)


def make_transport(args: argparse.Namespace, context: RoleContext) -> Transport:
    """The one that the flags name."""
    if args.update_weight_transport == "distributed":
        backend = args.distributed_backend or ("nccl" if torch.cuda.is_available() else "gloo")
        return DistributedTransport(args.update_weight_buffer_size, context.host, backend)
    if args.update_weight_transport == "tensor":
        return TensorTransport(args.update_weight_buffer_size)
    return DiskTransport(context.layout.weights, Path(args.hf_checkpoint))
