"""Weights from a Hugging Face directory into this rank's part of a Megatron-core model, slice by slice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.model.layers.lora import Adapter, adapters_of, is_adapter
from rltrain.megatron.model.names import HEAD, blocks, global_name, hf_shapes, merge, parameter
from rltrain.megatron.model.tensor_files import SafetensorsDirectory
from rltrain.megatron.ranks import control_group, together
from rltrain.models.quantised import SCALE_SUFFIX
from rltrain.models.tensors import Parameter
from rltrain.run.errors import UserError

_OUTPUT = "lm_head.weight"
_INDEXER = ".self_attn.indexer."
_EXTRA = re.compile(r"model\.(?:layers\.(\d+)|mtp_layers\.\d+)\.|mtp\.")
_BUFFER = ".rotary_emb.inv_freq"  # old checkpoints have it; every model computes it


@torch.no_grad()
def load_hf_weights(models: list[GPTModel], shape: ModelShape, directory: Path) -> None:
    """Fill a model (its chunks on this rank) with this rank's slices of the weights in a Hugging Face directory.

    All ranks call it together: what one of them finds wrong, all raise.

    Raises:
        UserError: no safetensors; a tensor is missing, not used, quantised, or has another shape than
            `config.json` says; a tied model with another output layer.
    """
    parameters = list(local_parameters(models, shape))
    source = together(lambda: _source(directory), UserError)
    _check_names(source, parameters, shape)
    together(lambda: _fill(source, parameters, shape), UserError)


def _source(directory: Path) -> SafetensorsDirectory:
    source = SafetensorsDirectory(directory)
    if any(name.endswith(f".weight{SCALE_SUFFIX}") for name in source.names):
        raise UserError(
            f"{directory} has quantised weights, which can't be trained. Give the model's bf16 weights."
        )
    return source


def _fill(source: SafetensorsDirectory, parameters: list[LocalParameter], shape: ModelShape) -> None:
    for each in parameters:
        entry, weight, size = each.entry, each.weight, each.group.size()
        wholes = hf_shapes(entry, tuple(weight.shape), size, shape)
        tensors = [source.tensor(name, whole) for name, whole in zip(entry.hf_names, wholes, strict=True)]
        parts = [_own_slice(tensor, each, shape, number) for number, tensor in enumerate(tensors)]
        merged = merge(parts, entry.layout, shape, size)
        if entry.layout == "vocab":
            merged = torch.nn.functional.pad(merged, (0, 0, 0, weight.shape[0] - merged.shape[0]))
            _check_tied(source, each, merged, shape)
        weight.copy_(merged)


def _own_slice(tensor: Any, parameter: LocalParameter, shape: ModelShape, number: int = 0) -> Tensor:
    """This rank's slice of a parameter's tensor; the last ranks of a vocabulary may get less, or nothing.

    Args:
        number: Which of its tensors.
    """
    entry = parameter.entry
    dim, size, rank = entry.split_dim, parameter.group.size(), parameter.group.rank()
    if entry.of_all_experts:
        whole: Tensor = tensor[entry.expert : entry.expert + 1]
        return whole[0]
    if dim is None:
        return tensor[:]
    length = tensor.get_shape()[dim]
    rows = blocks(entry.layout, length, shape, number)
    if len(rows) > 1:
        starts = [sum(rows[:i]) + rank * count // size for i, count in enumerate(rows)]
        return torch.cat(
            [tensor[start : start + count // size] for start, count in zip(starts, rows, strict=True)]
        )
    # Each rank's share of a vocabulary is one of its padded size, which the parameter has.
    width = parameter.weight.shape[0] if entry.layout == "vocab" else length // size
    start, stop = min(rank * width, length), min((rank + 1) * width, length)
    return tensor[start:stop] if dim == 0 else tensor[:, start:stop]


def _check_names(source: SafetensorsDirectory, parameters: list[LocalParameter], shape: ModelShape) -> None:
    """Refuse weights that no rank of the model holds: it would compute something else than they were made for."""
    own = sorted({name for each in parameters for name in each.entry.hf_names})
    everyone: list[list[str]] = [own] * dist.get_world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, own, group=control_group())
    used = {name for names in everyone for name in names}
    if shape.tied_embeddings:
        used.add(_OUTPUT)  # compared with the embedding
    heads = set(extra_heads(source.names, shape))
    extra = sorted(name for name in source.names - used - heads if not name.endswith(_BUFFER))
    if extra:
        few = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        raise UserError(
            f"{source.directory} has tensors that a {shape.architecture} with its config.json does not use: {few}."
            " Either config.json or the weights belong to another model."
        )


def extra_heads(names: Iterable[str], shape: ModelShape) -> list[str]:
    """Tensors that are kept as they are: of layers that predict further tokens, behind or beside the others, and of
    indexers.
    """
    numbers = ((name, _EXTRA.match(name)) for name in names if shape.family.extra_heads)
    return sorted(
        name
        for name, found in numbers
        if found and (int(found[1] or shape.num_layers) >= shape.num_layers or is_indexer(name, shape))
    )


def is_indexer(name: str, shape: ModelShape) -> bool:
    """Whether a tensor is of an indexer in one of the model's layers."""
    indexed = shape.latent is not None and shape.latent.chosen is not None
    found = _EXTRA.match(name) if indexed and _INDEXER in name else None
    return found is not None and int(found[1] or shape.num_layers) < shape.num_layers


def _check_tied(
    source: SafetensorsDirectory, parameter: LocalParameter, weight: Tensor, shape: ModelShape
) -> None:
    if not shape.tied_embeddings or _OUTPUT not in source.names:
        return
    output = source.tensor(_OUTPUT, (shape.vocab_size, weight.shape[1]))
    own = _own_slice(output, parameter, shape)
    if not torch.equal(own, weight[: own.shape[0]]):
        raise UserError(
            f"{source.directory}: config.json sets tie_word_embeddings to true, but its {_OUTPUT} is not its"
            f" {parameter.entry.hf_names[0]}. Set tie_word_embeddings to false, or remove {_OUTPUT}."
        )


def expert_biases(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What routers add to an expert's score where they choose: a weight of the model that gets no gradient."""
    return ((name, buffer) for name, buffer in model.named_buffers() if name.endswith("router.expert_bias"))


@dataclass(frozen=True)
class LocalParameter:
    """A weight of this rank's part of the model.

    Attributes:
        is_copy: A tied embedding's second copy, on the last pipeline stage.
        adapter: What LoRA adds to it.
        is_head: Of the layer that predicts one token more.
    """

    weight: Tensor
    entry: Parameter
    is_copy: bool = False
    adapter: Adapter | None = None
    is_head: bool = False

    def value(self) -> Tensor:
        """The weight as the model computes: with its adapter in it, in memory of its own then."""
        return self.weight.detach() if self.adapter is None else self.adapter.merged()

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that the weight is split over, if it is split."""
        if self.entry.is_expert:
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()


def local_parameters(models: list[GPTModel], shape: ModelShape) -> Iterator[LocalParameter]:
    """All weights of this rank's chunks of a model but adapters, with their place in the whole model."""
    for model in models:
        config, layers = model.config, model.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        experts = (config.num_moe_experts or 0) // config.expert_model_parallel_size
        first_expert = parallel_state.get_expert_model_parallel_rank() * experts
        adapters = {id(each.linear.weight): each for each in adapters_of([model])}
        for name, weight in chain(model.named_parameters(), expert_biases(model)):
            if is_adapter(name):
                continue
            is_copy = name == "output_layer.weight" and model.share_embeddings_and_output_weights
            whole = "embedding.word_embeddings.weight" if is_copy else name
            entry = parameter(global_name(whole, first_layer, first_expert), shape)
            yield LocalParameter(weight, entry, is_copy, adapters.get(id(weight)), name.startswith(HEAD))
