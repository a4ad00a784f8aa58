"""How fast a rollout was trained on, and what it took."""

from __future__ import annotations

import torch
import torch.distributed as dist

from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.device import device, peak_flops, peak_memory
from rltrain.megatron.flops import sequence_flops
from rltrain.megatron.micro_batch import computed_length
from rltrain.megatron.rank_share import RankShare
from rltrain.timing import Timers

_FORWARD_AND_BACKWARD = 3  # the backward pass takes two matrix products where the forward pass takes one


def measure(shape: ModelShape, share: RankShare, timers: Timers) -> dict[str, float]:
    """Metrics of time, speed and memory, the same on every rank.

    Seconds are those of the slowest rank and memory that of the fullest. `perf/mfu`, where the device's peak is
    known, counts the policy's forward and backward passes, without recomputation.
    """
    seconds = timers.metrics()
    largest = torch.tensor([*seconds.values(), peak_memory()], dtype=torch.float64, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    *values, memory = largest.tolist()
    metrics = dict(zip(seconds, values, strict=True))
    ranks = dist.get_world_size()
    metrics["perf/peak_memory_gib"] = memory / 2**30
    metrics["perf/tokens_per_s_per_rank"] = (
        share.batch.num_tokens / max(metrics["perf/train_all_s"], 1e-9) / ranks
    )
    trained = metrics.get("perf/actor_train_s")
    if trained is not None:
        flops = _FORWARD_AND_BACKWARD * batch_flops(shape, share) / max(trained, 1e-9) / ranks
        metrics["perf/tflops_per_rank"] = flops / 1e12
        if (peak := peak_flops()) is not None:
            metrics["perf/mfu"] = flops / peak
    return metrics


def batch_flops(shape: ModelShape, share: RankShare) -> float:
    """Of one forward pass over all samples of a rollout that are trained on."""
    counts = [share.trainable.count(i) for i in range(len(share.batch))]
    return sum(
        sequence_flops(shape, computed_length(tokens), count)
        for tokens, count in zip(share.batch.tokens, counts, strict=True)
        if count
    )
