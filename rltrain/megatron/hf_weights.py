"""Weights between a Hugging Face directory and a tensor parallel Megatron-core model, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from rltrain.megatron.hf_names import merge, parameter, split


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
def load_hf_weights(model: GPTModel, shape: ModelShape, directory: Path) -> None:
    """Fill a model with this rank's share of the weights in a Hugging Face directory.

    Raises:
        UserError: no safetensors, a tensor is missing, or one has another shape than `config.json` says.
    """
    source = SafetensorsDirectory(directory)
    size, rank = _tensor_parallel()
    for name, weight in model.named_parameters():
        entry = parameter(name)
        parts = [_read(source, hf_name, entry.split_dim, size, rank) for hf_name in entry.hf_names]
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


@torch.no_grad()
def export_hf_weights(model: GPTModel, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and whole tensors, one parameter at a time. Every tensor parallel rank must iterate.

    Yields:
        Tensors on the model's device; they may share memory with the model.
    """
    size, _ = _tensor_parallel()
    for name, weight in model.named_parameters():
        entry = parameter(name)
        dim = entry.split_dim
        shards = [weight.detach()] if dim is None else _gather(weight.detach(), size)
        groups = shape.num_kv_heads // len(shards)
        per_rank = [split(shard, entry.layout, shape, groups) for shard in shards]
        for hf_name, parts in zip(entry.hf_names, zip(*per_rank, strict=True), strict=True):
            tensor = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim=dim)
            yield hf_name, tensor[: shape.vocab_size] if entry.layout == "vocab" else tensor


def _read(source: SafetensorsDirectory, name: str, dim: int | None, size: int, rank: int) -> Tensor:
    """This rank's share of a tensor that is split along `dim`; the last ranks of a vocabulary may get less."""
    tensor = source[name]
    if dim is None:
        return tensor[:]
    length = tensor.get_shape()[dim]
    share = -(-length // size)
    start, stop = min(rank * share, length), min((rank + 1) * share, length)
    return tensor[start:stop] if dim == 0 else tensor[:, start:stop]


def _gather(shard: Tensor, size: int) -> list[Tensor]:
    if size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(size)]
    dist.all_gather(shards, shard.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return shards


def _tensor_parallel() -> tuple[int, int]:
    """Size and rank."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


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
