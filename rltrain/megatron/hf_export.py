"""The whole model's weights as Hugging Face tensors on rank 0, whatever ranks hold them.

Weights travel in buckets: the ranks that a weight is split over gather it, and the first of them sends the
finished tensors to rank 0. So no rank holds more than a bucket beside its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.device import device
from rltrain.megatron.distributed import control_group
from rltrain.megatron.hf_names import join, split
from rltrain.megatron.hf_weights import LocalParameter, local_parameters

BUCKET_BYTES = 512 * 1024**2

Named = list[tuple[str, Tensor]]
Value = Callable[[torch.nn.Parameter], Tensor]


def own_weight(weight: torch.nn.Parameter) -> Tensor:
    """What is exported unless something else is asked for."""
    return weight.detach()


@torch.no_grad()
def export_hf_weights(
    models: list[GPTModel], shape: ModelShape, value: Value = own_weight, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and whole tensors, on rank 0. Every rank must iterate to the end; the others get none.

    Args:
        models: This rank's chunks of the model.
        value: What to take of each parameter: a tensor of its shape.
        bucket_bytes: About how much is gathered and sent at a time.

    Yields:
        Tensors on the model's device; they may share memory with the model.
    """
    for part in parts_of(models, shape):
        tensors = _gathered(part, shape, value, bucket_bytes) if part.replica == 0 else iter(())
        yield from _on_rank_0(tensors, sends=part.replica == 0 and part.group.rank() == 0)


@dataclass(frozen=True)
class Part:
    """A rank's weights of one kind, experts or all others.

    Attributes:
        parameters: in the same order on all ranks of `group`, over which they are split, and on all replicas.
        replica: which of those that hold the same.
        key: which weights of the model it holds.
    """

    parameters: list[LocalParameter]
    group: dist.ProcessGroup
    replica: int
    key: tuple[int, ...]


def parts_of(models: list[GPTModel], shape: ModelShape) -> Iterator[Part]:
    """First what is shared out over tensor parallel ranks, then the experts.

    One rank has different peers for the two, and would otherwise wait for one that waits for it.
    """
    own = [parameter for parameter in local_parameters(models, shape) if not parameter.is_copy]
    stage = parallel_state.get_pipeline_model_parallel_rank()
    yield Part(
        [parameter for parameter in own if not parameter.entry.is_expert],
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        (stage,),
    )
    if shape.experts:
        yield Part(
            [parameter for parameter in own if parameter.entry.is_expert],
            parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_data_parallel_rank(),
            (stage, parallel_state.get_expert_model_parallel_rank()),
        )


def _gathered(part: Part, shape: ModelShape, value: Value, bucket_bytes: int) -> Iterator[Named]:
    """Whole tensors, one bucket at a time, on every rank of the group."""
    for bucket in buckets_of(part.parameters, value, bucket_bytes // part.group.size()):
        yield gather(bucket, part, shape, value)


def gather(bucket: list[LocalParameter], part: Part, shape: ModelShape, value: Value) -> Named:
    """The Hugging Face tensors of a bucket, on every rank of the part's group, which all gather it together."""
    tensors = [value(each.weight) for each in bucket]
    is_split = [each.entry.split_dim is not None for each in bucket]
    split_tensors = [tensor for tensor, divided in zip(tensors, is_split, strict=True) if divided]
    shards = iter(_all_gather(split_tensors, part.group))
    named: Named = []
    for each, tensor, divided in zip(bucket, tensors, is_split, strict=True):
        named += _whole(each, next(shards) if divided else [tensor], shape)
    return named


def buckets_of(parameters: list[LocalParameter], value: Value, size: int) -> Iterator[list[LocalParameter]]:
    """Neighbours of one type, up to about `size` bytes."""
    for _, same_type in groupby(parameters, key=lambda each: value(each.weight).dtype):
        bucket: list[LocalParameter] = []
        held = 0
        for each in same_type:
            nbytes = value(each.weight).nbytes
            if bucket and held + nbytes > size:
                yield bucket
                bucket, held = [], 0
            bucket.append(each)
            held += nbytes
        yield bucket


def _all_gather(tensors: list[Tensor], group: dist.ProcessGroup) -> list[list[Tensor]]:
    """Every rank's part of each tensor, with one message for all of them."""
    if group.size() == 1 or not tensors:
        return [[tensor] for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    gathered = flat.new_empty(group.size() * flat.numel())
    dist.all_gather_into_tensor(gathered, flat, group=group)
    sizes = [tensor.numel() for tensor in tensors]
    columns = zip(*(each.split(sizes) for each in gathered.chunk(group.size())), strict=True)
    return [[part.view_as(t) for part in parts] for t, parts in zip(tensors, columns, strict=True)]


def _whole(parameter: LocalParameter, shards: list[Tensor], shape: ModelShape) -> Named:
    """The Hugging Face tensors of a parameter from all its shards."""
    entry = parameter.entry
    groups = shape.num_kv_heads // len(shards)
    per_rank = [split(shard, entry.layout, shape, groups) for shard in shards]
    named: Named = []
    for hf_name, parts in zip(entry.hf_names, zip(*per_rank, strict=True), strict=True):
        tensor = join(list(parts), entry.layout, entry.split_dim or 0)
        named.append((hf_name, tensor[: shape.vocab_size] if entry.layout == "vocab" else tensor))
    return named


def _on_rank_0(buckets: Iterator[Named], *, sends: bool) -> Iterator[tuple[str, Tensor]]:
    """Rank 0's own buckets, then those of every other rank that sends."""
    senders = [False] * dist.get_world_size()
    if len(senders) > 1:
        dist.all_gather_object(senders, sends, group=control_group())
    if dist.get_rank() == 0:
        for bucket in buckets:
            yield from bucket
        for source in (rank for rank, each in enumerate(senders) if each and rank):
            yield from _receive(source)
        return
    for bucket in buckets:
        if sends:
            _send(bucket)
    if sends:
        _send([])


def _send(bucket: Named) -> None:
    """One bucket to rank 0; an empty one is the last."""
    described = [(name, tensor.shape, tensor.dtype) for name, tensor in bucket]
    dist.send_object_list([described], dst=0, group=control_group(), device=torch.device("cpu"))
    if bucket:
        dist.send(torch.cat([tensor.flatten() for _, tensor in bucket]), dst=0)


def _receive(source: int) -> Iterator[tuple[str, Tensor]]:
    while True:
        message: list[list[tuple[str, torch.Size, torch.dtype]] | None] = [None]
        dist.recv_object_list(message, src=source, group=control_group(), device=torch.device("cpu"))
        described = message[0]
        if not described:
            return
        sizes = [shape.numel() for _, shape, _ in described]
        flat = torch.empty(sum(sizes), dtype=described[0][2], device=device())
        dist.recv(flat, src=source)
        for (name, shape, _), part in zip(described, flat.split(sizes), strict=True):
            yield name, part.view(shape)
