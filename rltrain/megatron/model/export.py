"""The whole model's weights as Hugging Face tensors, whatever ranks hold them: all on rank 0, or shared out.

Weights travel in buckets: the ranks that a weight is split over gather it. For rank 0 the first of them sends the
finished tensors there (`export_hf_weights`); otherwise every rank keeps some of them (`export_own_share`). So no rank
holds more than a bucket beside its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain, groupby

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.device import device
from rltrain.megatron.model.layers.lora import adapters_of
from rltrain.megatron.model.load import LocalParameter, local_parameters
from rltrain.megatron.model.names import join, split
from rltrain.megatron.ranks import control_group
from rltrain.weights.buckets import Window

BUCKET_BYTES = 512 * 1024**2

Named = list[tuple[str, Tensor]]
Unit = list[LocalParameter]
Value = Callable[[Tensor], Tensor]

_ALL = Window(0, 1, 1)


@torch.no_grad()
def export_hf_weights(
    models: list[GPTModel], shape: ModelShape, value: Value | None = None, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and whole tensors, on rank 0. Every rank must iterate to the end; the others get none.

    Args:
        models: This rank's chunks of the model.
        value: What to take of each parameter, a tensor of its shape; None: the weight, with adapters merged.
        bucket_bytes: About how much is gathered and sent at a time.

    Yields:
        Tensors on the model's device; they may share memory with the model.
    """
    for part in _parts_of(models, shape):
        yield from _whole_on_rank_0(part, shape, value, bucket_bytes)


@torch.no_grad()
def export_adapters(models: list[GPTModel], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """LoRA's matrices by the name of their Hugging Face module, as `export_hf_weights` has weights."""
    found = [each for adapter in adapters_of(models) for each in adapter.files()]
    part = _part_without_experts([LocalParameter(weight, entry) for weight, entry in found])
    yield from _whole_on_rank_0(part, shape, None, BUCKET_BYTES)


def _whole_on_rank_0(
    part: Held, shape: ModelShape, value: Value | None, bucket_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    tensors = _gathered(part, shape, value, bucket_bytes) if part.replica == 0 else iter(())
    yield from _on_rank_0(tensors, sends=part.replica == 0 and part.group.rank() == 0)


@dataclass(frozen=True)
class Held:
    """A rank's weights of one kind, experts or all others.

    Attributes:
        parameters: in the same order on all ranks of `group`, over which they are split, and on all replicas.
            Of tensors that have all experts, `group` are the ranks that these are shared out over.
        replica: which of those that hold the same.
        key: which weights of the model it holds.
    """

    parameters: list[LocalParameter]
    group: dist.ProcessGroup
    replica: int
    key: tuple[int, ...]

    def units(self) -> list[Unit]:
        """The units of gathering: one per weight, except that all experts in one tensor form one unit."""
        found: dict[object, Unit] = {}
        for number, each in enumerate(self.parameters):
            key = each.entry.hf_names if each.entry.of_all_experts else number
            found.setdefault(key, []).append(each)
        return list(found.values())


def _parts_of(models: list[GPTModel], shape: ModelShape) -> Iterator[Held]:
    """First what is shared out over tensor parallel ranks, then the experts.

    One rank has different peers for the two, and would otherwise wait for one that waits for it.
    """
    own = [parameter for parameter in local_parameters(models, shape) if not parameter.is_copy]
    stage = parallel_state.get_pipeline_model_parallel_rank()
    yield _part_without_experts([parameter for parameter in own if not parameter.entry.is_expert])
    if shape.experts:
        experts = [parameter for parameter in own if parameter.entry.is_expert]
        fused = any(parameter.of_all_experts for parameter in shape.family.tensors.values())
        yield Held(
            experts,
            parallel_state.get_expert_model_parallel_group()
            if fused
            else parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_data_parallel_rank(),
            (stage, 0 if fused else parallel_state.get_expert_model_parallel_rank()),
        )


def _part_without_experts(parameters: list[LocalParameter]) -> Held:
    return Held(
        parameters,
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        (parallel_state.get_pipeline_model_parallel_rank(),),
    )


def _gathered(part: Held, shape: ModelShape, value: Value | None, bucket_bytes: int) -> Iterator[Named]:
    """Whole tensors, one bucket at a time, on every rank of the group."""
    for bucket in _buckets_of(part.units(), value, bucket_bytes // part.group.size()):
        yield _gather(bucket, part, shape, value)


def _gather(bucket: list[Unit], part: Held, shape: ModelShape, value: Value | None) -> Named:
    """The Hugging Face tensors of a bucket, on every rank of the part's group, which all gather it together."""
    return list(chain.from_iterable(_gather_each(bucket, part, shape, value)))


def _gather_each(bucket: list[Unit], part: Held, shape: ModelShape, value: Value | None) -> Iterator[Named]:
    """The same, unit by unit."""
    gathered = [
        each
        for unit in bucket
        for each in unit
        if each.entry.split_dim is not None or each.entry.of_all_experts
    ]
    shards = iter(_all_gather([_taken(each, value) for each in gathered], part.group))
    for unit in bucket:
        if unit[0].entry.of_all_experts:
            yield [_all_experts(unit, [next(shards) for _ in unit], shape)]
            continue
        named: Named = []
        for each in unit:
            own = [_taken(each, value)] if each.entry.split_dim is None else next(shards)
            named += _whole(each, own, shape)
        yield named


def _taken(parameter: LocalParameter, value: Value | None) -> Tensor:
    return parameter.value() if value is None else value(parameter.weight)


def _buckets_of(units: list[Unit], value: Value | None, size: int) -> Iterator[list[Unit]]:
    """Neighbours of one type, up to about `size` bytes."""
    value = value or torch.Tensor.detach  # merged with adapters it has the same type and size
    for _, same_type in groupby(units, key=lambda unit: value(unit[0].weight).dtype):
        bucket: list[Unit] = []
        held = 0
        for unit in same_type:
            nbytes = sum(value(each.weight).nbytes for each in unit)
            if bucket and held + nbytes > size:
                yield bucket
                bucket, held = [], 0
            bucket.append(unit)
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
    per_rank = [split(shard, entry.layout, shape, len(shards)) for shard in shards]
    named: Named = []
    for number, parts in enumerate(zip(*per_rank, strict=True)):
        hf_name = entry.hf_names[number]
        tensor = join(list(parts), entry.layout, entry.split_dim or 0, shape, number)
        named.append((hf_name, tensor[: shape.vocab_size] if entry.layout == "vocab" else tensor))
    return named


def _all_experts(unit: Unit, shards: list[list[Tensor]], shape: ModelShape) -> tuple[str, Tensor]:
    """The tensor that has all experts, from this rank's experts as all ranks hold them.

    Args:
        shards: Of each of this rank's experts those that have its place on all ranks.
    """
    layout = unit[0].entry.layout
    of_ranks = zip(*shards, strict=True)
    experts = [split(weight, layout, shape, 1)[0] for own in of_ranks for weight in own]
    return unit[0].entry.hf_names[0], torch.stack(experts)


def _on_rank_0(buckets: Iterator[Named], *, sends: bool) -> Iterator[tuple[str, Tensor]]:
    """Rank 0's own buckets, then those of every other rank that sends."""
    senders = torch.zeros(dist.get_world_size(), dtype=torch.int32)
    if len(senders) > 1:
        senders[dist.get_rank()] = sends
        dist.all_reduce(senders, group=control_group())
    if dist.get_rank() == 0:
        for bucket in buckets:
            yield from bucket
        for source in (rank for rank, each in enumerate(senders.tolist()) if each and rank):
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
        takers: Ranks that get a share (default: all). A weight that none of them has goes to a rank that has it.
    """
    parts = list(_parts_of(models, shape))
    for part, replicas in zip(parts, _takers(parts, takers), strict=True):
        yield from _dealt_out(part, replicas, shape, bucket_bytes)


def _takers(parts: list[Held], takers: Collection[int] | None) -> list[dict[int, list[int]]]:
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
    part: Held, replicas: dict[int, list[int]], shape: ModelShape, bucket_bytes: int
) -> Iterator[Named]:
    """In a round each replica gathers one bucket; of its ranks the one that has least takes a tensor.

    All have as many rounds, as some that meet again at the experts may have nothing to do here.
    """
    total = sum(parameter.weight.nbytes for parameter in part.parameters)
    size = min(bucket_bytes // part.group.size(), -(-total // len(replicas)))
    turn = list(replicas).index(part.replica) if part.replica in replicas else len(replicas)
    taken = dict.fromkeys(replicas.get(part.replica, []), 0)
    buckets = list(_buckets_of(part.units(), None, size))
    for first in range(0, len(buckets), len(replicas)):
        mine: Named = []
        for bucket in buckets[first : first + len(replicas)][turn : turn + 1]:
            for name, tensor in _gather(bucket, part, shape, None):
                taker = min(taken, key=lambda rank: (taken[rank], rank))
                taken[taker] += tensor.nbytes
                if taker == part.group.rank():
                    mine.append((name, tensor))
        yield mine


@torch.no_grad()
def export_even_share(
    models: list[GPTModel], shape: ModelShape, bucket_bytes: int, takers: Collection[int]
) -> Iterator[list[tuple[Window, Named]]]:
    """As `export_own_share`, but where several ranks hold the same weights, each gets as many bytes as the others.

    Yields:
        Whole tensors, and which part of them the rank has got; other ranks in the same round have the rest.
    """
    parts = list(_parts_of(models, shape))
    for part, replicas in zip(parts, _takers(parts, takers), strict=True):
        if len(replicas) > 1:
            yield from _in_windows(part, replicas, shape, bucket_bytes)
        else:
            yield from ([(_ALL, named)] for named in _dealt_out(part, replicas, shape, bucket_bytes))


def _in_windows(
    part: Held, replicas: dict[int, list[int]], shape: ModelShape, bucket_bytes: int
) -> Iterator[list[tuple[Window, Named]]]:
    """All weights end to end, cut into windows of the same size; in a round each replica gathers what lies in one.

    A tensor of many windows, such as an embedding, is gathered by all replicas whose windows it lies in. That costs
    less than if one of them sent it to all engines.
    """
    total = sum(parameter.weight.nbytes for parameter in part.parameters)
    size = max(1, min(bucket_bytes // part.group.size(), -(-total // len(replicas))))
    rounds = -(-total // (size * len(replicas)))
    turn = list(replicas).index(part.replica) if part.replica in replicas else None
    taken = dict.fromkeys(replicas.get(part.replica, []), 0)
    for number in range(rounds):
        mine: list[tuple[Window, Named]] = []
        if turn is not None:
            edges = (
                total * (number * len(replicas) + i) // (rounds * len(replicas)) for i in (turn, turn + 1)
            )
            for window, named in _gather_window(part, shape, *edges):
                taker = min(taken, key=lambda rank: (taken[rank], rank))
                taken[taker] += window.end - window.start
                if taker == part.group.rank():
                    mine.append((window, named))
        yield mine


def _gather_window(part: Held, shape: ModelShape, start: int, end: int) -> Iterator[tuple[Window, Named]]:
    """What lies between two bytes of a rank's weights of a part, end to end: whole tensors, and the window on them."""
    place = 0
    found: list[tuple[Unit, Window]] = []
    for unit in part.units():
        nbytes = sum(each.weight.nbytes for each in unit)
        low, high = max(start - place, 0), min(end - place, nbytes)
        if low < high:
            found.append((unit, Window(low, high, nbytes)))
        place += nbytes
    for _, same_type in groupby(found, key=lambda each: each[0][0].weight.dtype):
        units, windows = zip(*same_type, strict=True)
        yield from zip(windows, _gather_each(list(units), part, shape, None), strict=True)
