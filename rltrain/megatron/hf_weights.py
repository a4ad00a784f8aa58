"""Weights from a Hugging Face directory into this rank's part of a Megatron-core model, slice by slice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open
from torch import Tensor

from rltrain.arguments.errors import UserError
from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.hf_names import Parameter, global_name, merge, parameter


class SafetensorsDirectory:
    """The tensors of a Hugging Face directory; reads only the slices that are asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = _tensor_files(directory)
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """safetensors' lazy slice of a tensor: `get_shape()`, and reading by indexing.

        Raises:
            UserError: the directory has no such tensor.
        """
        file = self._files.get(name)
        if file is None:
            raise UserError(
                f"{self._directory} has no tensor {name}: its weights do not fit its config.json."
            )
        if file not in self._open:
            self._open[file] = safe_open(self._directory / file, framework="pt")
        return self._open[file].get_slice(name)


@torch.no_grad()
def load_hf_weights(models: list[GPTModel], shape: ModelShape, directory: Path) -> None:
    """Fill a model (its chunks on this rank) with this rank's share of the weights in a Hugging Face directory.

    Raises:
        UserError: no safetensors, a tensor is missing, or one has another shape than `config.json` says.
    """
    source = SafetensorsDirectory(directory)
    for each in local_parameters(models, shape):
        entry, weight = each.entry, each.weight
        size, rank = each.group.size(), each.group.rank()
        parts = [_read(source, hf_name, entry, size, rank) for hf_name in entry.hf_names]
        merged = merge(parts, entry.layout, shape.num_kv_heads // size)
        if entry.layout == "vocab":
            padding = weight.shape[0] - merged.shape[0]
            merged = torch.nn.functional.pad(merged, (0, 0, 0, padding)) if padding > 0 else merged
        if merged.shape != weight.shape:
            raise UserError(
                f"{' and '.join(entry.hf_names)} in {directory} make a weight of shape {tuple(merged.shape)},"
                f" but config.json asks for {tuple(weight.shape)}."
            )
        weight.copy_(merged)


def _read(source: SafetensorsDirectory, name: str, entry: Parameter, size: int, rank: int) -> Tensor:
    """This rank's share of a tensor; the last ranks of a vocabulary may get less."""
    tensor, dim = source[name], entry.split_dim
    if dim is None:
        return tensor[:]
    length = tensor.get_shape()[dim]
    if entry.layout == "halves":
        share = length // 2 // size
        starts = (rank * share, length // 2 + rank * share)
        return torch.cat([tensor[start : start + share] for start in starts])
    share = -(-length // size)
    start, stop = min(rank * share, length), min((rank + 1) * share, length)
    return tensor[start:stop] if dim == 0 else tensor[:, start:stop]


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank's part of the model.

    Attributes:
        is_copy: A tied embedding's second copy, on the last pipeline stage.
    """

    weight: torch.nn.Parameter
    entry: Parameter
    is_copy: bool

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that the weight is split over, if it is split."""
        if self.entry.is_expert:
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()


def local_parameters(models: list[GPTModel], shape: ModelShape) -> Iterator[LocalParameter]:
    """All parameters of this rank's chunks of a model, with their place in the whole model."""
    for model in models:
        config, layers = model.config, model.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        experts = (config.num_moe_experts or 0) // config.expert_model_parallel_size
        first_expert = parallel_state.get_expert_model_parallel_rank() * experts
        for name, weight in model.named_parameters():
            is_copy = name == "output_layer.weight" and model.share_embeddings_and_output_weights
            whole = "embedding.word_embeddings.weight" if is_copy else name
            entry = parameter(global_name(whole, first_layer, first_expert), shape.family)
            yield LocalParameter(weight, entry, is_copy)


def _tensor_files(directory: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return json.loads(index.read_text())["weight_map"]
    if not (directory / "model.safetensors").exists():
        raise UserError(
            f"{directory} has no model.safetensors and no model.safetensors.index.json: weights are read from"
            " safetensors only. Give --random-init to start from random weights."
        )
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")
