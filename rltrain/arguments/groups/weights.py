"""How weights reach the engines; docs/engines.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rltrain.arguments.declare import flag


@dataclass(frozen=True)
class Weights:
    """Weight updates."""

    update_weight_transport: Literal["auto", "disk", "tensor", "distributed", "nccl"] = flag(
        "how weights reach the engines: files, shared memory, process groups (default: by layout)", "auto"
    )
    update_weight_mode: Literal["full", "delta"] = flag(
        "delta: send only what changed since the last push (default: full)", "full"
    )
    update_weight_buffer_size: int = flag(
        "bytes of weights in transit at a time (default: 512 MiB); at most 32 MiB except over NCCL",
        536870912,
        metavar="BYTES",
        at_least=1,
    )
    check_weight_update_equal: bool = flag(
        "fill engines with random numbers, and check once that a push restores every tensor", False
    )
    update_weights_interval: int = flag("rollouts between pushes (default: 1)", 1, metavar="N", at_least=1)
