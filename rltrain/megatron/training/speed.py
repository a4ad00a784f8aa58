"""How fast a rollout was trained on, and what it took."""

from __future__ import annotations

import torch
import torch.distributed as dist

from rltrain.megatron.device import device, peak_flops, peak_memory
from rltrain.megatron.training.share import RankShare
from rltrain.run.timing import Timers

# The backward pass takes two matrix products where the forward pass takes one: with adapters, the one for what goes on
# to the layer before, as weights have no gradient.
_PASSES, _PASSES_WITH_ADAPTERS = 3, 2


def measure(share: RankShare, timers: Timers) -> dict[str, float]:
    """Metrics of time, speed and memory, the same on every rank.

    Seconds are the slowest rank's, and memory is the fullest rank's. `perf/mfu`, where the device's peak is
    known, counts the policy's forward and backward passes, without recomputation. `perf/shared_tokens` are those of
    prompts that were computed for another sample of the micro-batch: in `perf/tokens_per_s_per_rank` they count.
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
    metrics["perf/shared_tokens"] = float(share.num_shared())
    trained = metrics.get("perf/actor_train_s")
    if trained is not None:
        passes = _PASSES_WITH_ADAPTERS if share.has_adapters else _PASSES
        flops = passes * share.flops() / max(trained, 1e-9) / ranks
        metrics["perf/tflops_per_rank"] = flops / 1e12
        if (peak := peak_flops()) is not None:
            metrics["perf/mfu"] = flops / peak
    return metrics
