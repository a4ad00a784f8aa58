"""The whole model's weights as Hugging Face tensors, shared out over the ranks; `hf_export` has them all on rank 0."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.distributed import control_group
from rltrain.megatron.hf_export import (
    BUCKET_BYTES,
    Named,
    Part,
    buckets_of,
    gather,
    own_weight,
    parts_of,
)


@torch.no_grad()
def export_own_share(
    models: list[GPTModel],
    shape: ModelShape,
    bucket_bytes: int = BUCKET_BYTES,
    takers: Collection[int] | None = None,
) -> Iterator[Named]:
    """Every rank gets some of the whole tensors, and all together each of them once.

    Every rank must iterate to the end, in rounds: to get the next it may need others that are in the same round.

    Args:
        takers: Ranks that shall get some (default: all). Where none of them has a weight, one that has it does.
    """
    parts = list(parts_of(models, shape))
    for part, replicas in zip(parts, _takers(parts, takers), strict=True):
        yield from _dealt_out(part, replicas, shape, bucket_bytes)


def _takers(parts: list[Part], takers: Collection[int] | None) -> list[dict[int, list[int]]]:
    """Of each part the replicas that get some of it: which ranks of their groups do, and at least one."""
    own = [(part.key, part.replica, part.group.rank()) for part in parts]
    everyone: list[list[tuple[tuple[int, ...], int, int]]] = [own] * dist.get_world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, own, group=control_group())
    found: list[dict[int, list[int]]] = []
    for part in parts:
        replicas: dict[int, list[int]] = {}
        for rank, held in enumerate(everyone):
            for key, replica, number in held:
                if key == part.key and (takers is None or rank in takers):
                    replicas.setdefault(replica, []).append(number)
        found.append({replica: sorted(replicas[replica]) for replica in sorted(replicas)} or {0: [0]})
    return found


def _dealt_out(
    part: Part, replicas: dict[int, list[int]], shape: ModelShape, bucket_bytes: int
) -> Iterator[Named]:
    """In a round each replica gathers one bucket; of its ranks the one that has least takes a tensor.

    All have as many rounds, as some that meet again at the experts may have nothing to do here.
    """
    total = sum(parameter.weight.nbytes for parameter in part.parameters)
    size = min(bucket_bytes // part.group.size(), -(-total // len(replicas)))
    turn = list(replicas).index(part.replica) if part.replica in replicas else len(replicas)
    taken = dict.fromkeys(replicas.get(part.replica, []), 0)
    buckets = list(buckets_of(part.parameters, own_weight, size))
    for first in range(0, len(buckets), len(replicas)):
        mine: Named = []
        for bucket in buckets[first : first + len(replicas)][turn : turn + 1]:
            for name, tensor in gather(bucket, part, shape, own_weight):
                taker = min(taken, key=lambda rank: (taken[rank], rank))
                taken[taker] += tensor.nbytes
                if taker == part.group.rank():
                    mine.append((name, tensor))
        yield mine
