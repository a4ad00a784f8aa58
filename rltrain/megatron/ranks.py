"""Connects the trainer's ranks: process group, Megatron-core's groups, seeds, and what they tell each other.

Rank 0 tells the others what it has learnt from the job; and a problem of one rank becomes the problem of all, so that
all go on or all give up.
"""

from __future__ import annotations

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

from rltrain.arguments.groups.parallel import Parallel
from rltrain.megatron import device
from rltrain.run.errors import UserError
from rltrain.run.http import make_url
from rltrain.run.processes import family_of
from rltrain.run.role import RoleAddress, RoleContext
from rltrain.weights.sources import open_store

T = TypeVar("T")

_ROLE = "trainer"
_RENDEZVOUS_TIMEOUT = 600.0  # seconds


class RegistryClient(Protocol):
    """What is needed of `rltrain.run.role.Registry`."""

    def register(self, url: str) -> None:
        """Announce an address."""

    def wait_for(self, role: str, count: int = 1, timeout: float = 600.0) -> list[RoleAddress]:
        """Addresses of a role."""


def init_process_group(context: RoleContext, registry: RegistryClient, parallel: Parallel, seed: int) -> None:
    """Bring the ranks together; `RANK` and `WORLD_SIZE` say who and how many.

    Rank 0 opens the rendezvous on a port that the system chooses and registers it; the others look it up.
    """
    device.set_up()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host = local_address(context.registry_url)
    if name := interface_of(host):  # gloo would take what the host's name means to the host itself
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    if rank == 0:
        store = open_store(host, timeout, world_size)
        registry.register(make_url(host, store.port, "tcp"))
        master = (host, store.port)
    else:
        url = urlsplit(registry.wait_for(_ROLE, timeout=_RENDEZVOUS_TIMEOUT)[0].url)
        assert url.hostname and url.port
        master = (url.hostname, url.port)
        store = dist.TCPStore(url.hostname, url.port, world_size, is_master=False, timeout=timeout)
    # For code of the user's that looks there, as under torchrun.
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = master[0], str(master[1])
    join(parallel, seed, store, rank, world_size)


def join(parallel: Parallel, seed: int, store: dist.Store, rank: int, world_size: int) -> None:
    """Form the process group and Megatron-core's groups over an open store, and seed everything."""
    dist.init_process_group(
        device.backend(parallel.distributed_backend),
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=parallel.distributed_timeout_minutes),
    )
    split_ranks(parallel, seed)


def split_ranks(parallel: Parallel, seed: int) -> None:
    """Form Megatron-core's groups of all ranks, in place of earlier ones, and seed everything.

    Groups of the same sizes stay: each has threads, which do not end when another takes its place.
    """
    if not are_split(parallel):
        _form_groups(parallel)
    set_seeds(seed)


def are_split(parallel: Parallel) -> bool:
    """Whether the ranks have groups of these sizes."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return False
    tensor = parallel.tensor_model_parallel_size
    return (
        parallel_state.get_tensor_model_parallel_world_size() == tensor
        and parallel_state.get_pipeline_model_parallel_world_size() == parallel.pipeline_model_parallel_size
        and parallel_state.get_context_parallel_world_size() == parallel.context_parallel_size
        and parallel_state.get_expert_model_parallel_world_size() == parallel.expert_model_parallel_size
        and parallel_state.get_expert_tensor_parallel_world_size()
        == (parallel.expert_tensor_parallel_size or tensor)
    )


def _form_groups(parallel: Parallel) -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )


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
    """Run `call` on rank 0 and give its result, which is pickled and should be small, to every rank."""
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


class TrainerRanks:
    """See `rltrain.weights.rounds.Ranks`."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self._count, self._group = dist.get_world_size(), control_group()

    def gather(self, value: T) -> list[T]:
        """See `Ranks.gather`."""
        if self._count == 1:
            return [value]
        gathered: list[T | None] | None = [None] * self._count if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0, group=self._group)
        return gathered or []  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        """See `Ranks.broadcast`."""
        return on_rank_0(lambda: value)


def first_problem(problem: str | None) -> str | None:
    """The first rank's problem, the same text on every rank; None if no rank has one."""
    any_has_one = torch.tensor(0 if problem is None else 1)
    dist.all_reduce(any_has_one, group=control_group())  # a fraction of what it takes to exchange texts
    if not any_has_one:
        return None
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=control_group())
    found = [(rank, each) for rank, each in enumerate(problems) if each is not None]
    rank, text = found[0]
    return text if len(problems) == 1 else f"{text} (rank {rank})"


def together(call: Callable[[], T], failure: Callable[[str], Exception]) -> T:
    """The result of `call`, which every rank makes on its own and which must not talk to other ranks.

    Raises:
        Exception: what `failure` makes of the first problem, on every rank, if `call` raised `OSError` or
            `UserError` on any.
    """
    result, problem = None, None
    try:
        result = call()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{type(error).__name__}: {error}"
    found = first_problem(problem)
    if found is not None:
        raise failure(found)
    return result  # type: ignore[return-value]


def local_address(url: str) -> str:
    """The address of this machine on the network that leads to `url`, so that its users can reach us too."""
    target = urlsplit(url)
    with socket.create_connection((target.hostname, target.port), timeout=30) as connection:
        return connection.getsockname()[0]


def interface_of(address: str) -> str | None:
    """Name of this machine's network interface that has an address, or None."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family == family_of(address) and each.address == address for each in addresses):
            return name
    return None
