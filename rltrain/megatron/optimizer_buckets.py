"""Repairs Megatron-core's reshardable checkpoints of a distributed optimizer whose gradient buffer has several buckets.

A tied embedding has a bucket of its own where pipeline stages share it. Megatron-core (0.16 to 0.18) gathers the
optimizer's state without the padding at the end of each bucket, but looks parameters up where they are with it: those
behind a padded bucket get their neighbours' numbers, weights included, and nothing complains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.optimizer import MegatronOptimizer


@contextmanager
def padding_counted(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While entered, the padding between buckets counts as content, so that both places are the same.

    Also right for a Megatron-core without the defect: it then finds no padding to leave out.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    buffers = [buffer for part in parts for buffer in getattr(part, "buffers", [])]
    before = [(each, each.numel_unpadded) for buffer in buffers for each in (buffer, *buffer.buckets)]
    for buffer in buffers:
        for bucket in buffer.buckets[:-1]:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)
    try:
        yield
    finally:
        for each, numel in before:
            each.numel_unpadded = numel
