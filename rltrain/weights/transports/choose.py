"""How weights reach the engines: `--update-weight-transport`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rltrain.arguments.config import Config
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.parallel import Parallel
from rltrain.weights.rounds import Transport
from rltrain.weights.transports.distributed import DistributedTransport
from rltrain.weights.transports.tensor import SharedMemoryTransport

# In host memory one bucket is filled while another is sent and a third loaded. Larger buckets leave less to do at the
# same time, and smaller ones cost more messages (measured with benchmarks/weight_transports.py).
_HOST_BUCKET_BYTES = 32 * 1024**2


def choose(config: Config, are_here: Sequence[bool]) -> str:
    """The transport that `auto` stands for; `are_here` says of each engine whether it is on this machine.

    Shared memory where the trainer and all engines are on this machine, else process groups. With `--colocate` on
    several machines it is files: NCCL can't have two processes of one GPU in a group, and a file crosses the network
    once for each machine, a broadcast by gloo once for each engine. With `--update-weight-mode delta` it is not shared
    memory, which has nothing to save.
    """
    if config.weights.update_weight_transport != "auto":
        return config.weights.update_weight_transport
    if all(are_here) and config.parallel.actor_num_nodes == 1 and config.weights.update_weight_mode == "full":
        return "tensor"
    return "disk" if config.engines.colocate else "distributed"


def make_transport(name: str, engines: Engines, parallel: Parallel, host: str, rank: int) -> Transport:
    """The transport `tensor` or `distributed`, for a rank of the trainer whose machine has the address `host`."""
    if name == "tensor":
        return SharedMemoryTransport()
    return DistributedTransport(host, _backend(engines, parallel), rank)


def bucket_bytes(name: str, config: Config) -> int:
    """Size of a bucket: `--update-weight-buffer-size`, but less in host memory."""
    size = config.weights.update_weight_buffer_size
    if name == "distributed" and _backend(config.engines, config.parallel) == "nccl":
        return size
    return min(size, _HOST_BUCKET_BYTES)


def _backend(engines: Engines, parallel: Parallel) -> str:
    """With `--colocate` trainer and engine are two processes on one GPU, which NCCL refuses."""
    if engines.colocate:
        return "gloo"
    return parallel.distributed_backend or ("nccl" if torch.cuda.is_available() else "gloo")
