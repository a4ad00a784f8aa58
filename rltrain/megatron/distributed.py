"""Connects the trainer's ranks: process group, Megatron-core's groups, seeds, what rank 0 tells all."""

from __future__ import annotations

import argparse
import os
import random
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.distributed as dist

from rltrain.megatron import device
from rltrain.runtime import RoleAddress, RoleContext

T = TypeVar("T")

_ROLE = "trainer"
_RENDEZVOUS_TIMEOUT = 600.0  # seconds


class RegistryClient(Protocol):
    """What is needed of `rltrain.runtime.Registry`."""

    def register(self, url: str) -> None:
        """Announce an address."""

    def wait_for(self, role: str, count: int = 1, timeout: float = 600.0) -> list[RoleAddress]:
        """Addresses of a role."""


def init_process_group(context: RoleContext, registry: RegistryClient, args: argparse.Namespace) -> None:
    """Bring the ranks together; `RANK` and `WORLD_SIZE` say who and how many.

    Rank 0 opens the rendezvous on a port that the system chooses and registers it; the others look it up.
    """
    device.set_up()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host = local_address(context.registry_url)
    if name := interface_of(host):  # gloo would take what the host's name means to the host itself
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    if rank == 0:
        store = _open_store(host, world_size, timeout)
        registry.register(f"tcp://{host}:{store.port}")
        master = (host, store.port)
    else:
        url = urlsplit(registry.wait_for(_ROLE, timeout=_RENDEZVOUS_TIMEOUT)[0].url)
        assert url.hostname and url.port
        master = (url.hostname, url.port)
        store = dist.TCPStore(url.hostname, url.port, world_size, is_master=False, timeout=timeout)
    # For code of the user's that looks there, as under torchrun.
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = master[0], str(master[1])
    join(args, store, rank, world_size)


def join(args: argparse.Namespace, store: dist.Store, rank: int, world_size: int) -> None:
    """Form the process group and Megatron-core's groups over an open store, and seed everything."""
    dist.init_process_group(
        device.backend(args.distributed_backend),
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=args.distributed_timeout_minutes),
    )
    split_ranks(args)


def split_ranks(args: argparse.Namespace) -> None:
    """Form Megatron-core's groups of the ranks that there are, in place of earlier ones, and seed everything."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    set_seeds(args.seed)


def set_seeds(seed: int) -> None:
    """The same seed on every rank of a pipeline stage; Megatron-core derives others from it where it must."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    seed += (
        100 * parallel_state.get_pipeline_model_parallel_rank()
    )  # as Megatron-LM: layers must not be alike
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


@cache
def control_group() -> dist.ProcessGroup:
    """A gloo group of all ranks for what rank 0 tells the others; made when first used, by all at once.

    Ranks wait here while rank 0 waits for a rollout, for longer than any collective of the training should
    take. A rank that died is noticed by the supervisor, not by a timeout.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def on_rank_0(call: Callable[[], T]) -> T:
    """Run `call` on rank 0 and give its result to every rank."""
    group = control_group()
    result: list[T | None] = [call() if dist.get_rank() == 0 else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(result, src=0, group=group)
    return result[0]  # type: ignore[return-value]


def on_last_stage(call: Callable[[], T]) -> T:
    """What `call` returns on the last pipeline stage, which alone runs it, on all stages."""
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    result: list[T | None] = [call() if group.rank() == group.size() - 1 else None]
    if group.size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(result, src=last, group=group)
    return result[0]  # type: ignore[return-value]


def local_address(url: str) -> str:
    """The address of this machine on the network that leads to `url`, so that its users can reach us too."""
    target = urlsplit(url)
    with socket.create_connection((target.hostname, target.port), timeout=30) as connection:
        return connection.getsockname()[0]


def interface_of(address: str) -> str | None:
    """Name of this machine's network interface that has an IPv4 address, or None."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family == socket.AF_INET and each.address == address for each in addresses):
            return name
    return None


def _open_store(host: str, world_size: int, timeout: timedelta) -> dist.TCPStore:
    # Bound here and handed over: the store would listen on every interface by itself.
    listener = socket.create_server((host, 0))
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
