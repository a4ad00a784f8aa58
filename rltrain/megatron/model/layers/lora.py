"""LoRA: low-rank adapters on linear layers whose own weights stay as they are (arXiv 2106.09685), as in PEFT.

A layer adds `scale · B A x` to its own output for x. One layer of Megatron-core holds several of Hugging Face (query,
key and value; gate and up), each of which has its own A and B. All are computed with two products: the A matrices
stacked by rows, the B matrices as blocks of one matrix in the layer's row order.

Tensor parallelism splits them like the layer: by output rows of B, or by input columns of A. Every rank holds the other
one whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from rltrain.arguments.groups.training import Lora
from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.device import device
from rltrain.megatron.model.layers.norms import rms_norm
from rltrain.megatron.model.names import hf_shapes, merge, parameter
from rltrain.models.tensors import Layout, Parameter

_NAME = "lora"
_ATTENTION = ("self_attention.linear_qkv", "self_attention.linear_proj")
_MLP = ("mlp.linear_fc1", "mlp.linear_fc2")


class Adapter(torch.nn.Module):
    """The adapters of one linear layer, which get their weights in `reset`.

    Attributes:
        linear: The layer; not a part of this module.
        entry: Where the layer's weight comes from.
        a: By the last word of the Hugging Face module's name, [rank, input].
        b: [output, rank]. Rows as in Hugging Face's module, but those of `fused_qkv` as in Megatron-core's.
    """

    def __init__(
        self,
        linear: Any,
        entry: Parameter,
        shape: ModelShape,
        config: TransformerConfig,
        lora: Lora,
        seed: int,
    ) -> None:
        super().__init__()
        self._linear = (linear,)
        self.entry, self._shape, self._config, self._seed = entry, shape, config, seed
        self.rank, self.scale = lora.lora_rank, lora.scale
        self.is_column = entry.split_dim == 0
        wholes = hf_shapes(entry, tuple(linear.weight.shape), config.tensor_model_parallel_size, shape)
        split = config.tensor_model_parallel_size if self.is_column else 1
        self._rows = {last_word(name): whole[0] // split for name, whole in self._wholes(wholes).items()}
        self.a, self.b = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        options = {"dtype": config.params_dtype, "device": device()}
        for name in filter(lora.is_target, self._rows):
            self.a[name] = torch.empty(self.rank, linear.weight.shape[1], **options)
            self.b[name] = torch.zeros(self._rows[name], self.rank, **options)
            split_one, whole_one = (
                (self.b[name], self.a[name]) if self.is_column else (self.a[name], self.b[name])
            )
            set_tensor_model_parallel_attributes(split_one, True, 0 if self.is_column else 1, 1)
            # Its gradient is summed over tensor parallel ranks, each of which saw other tokens.
            whole_one.sequence_parallel = config.sequence_parallel
        self.reset()

    @property
    def linear(self) -> Any:
        """The layer that it is for."""
        return self._linear[0]

    def _wholes(self, shapes: list[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return dict(zip(modules_of(self.entry), shapes, strict=True))

    @torch.no_grad()
    def reset(self) -> None:
        """Begin anew as PEFT does: B is zero, A random; the same for every layout and order of layers."""
        for module in modules_of(self.entry):
            name = last_word(module)
            if name not in self.a:
                continue
            own = self.a[name]
            ranks = 1 if self.is_column else self._config.tensor_model_parallel_size
            generator = torch.Generator().manual_seed(self._seed + crc32(module.encode()))
            bound = 1 / math.sqrt(own.shape[1] * ranks)  # kaiming_uniform_ with a = √5
            whole = torch.empty(self.rank, own.shape[1] * ranks).uniform_(-bound, bound, generator=generator)
            place = 0 if self.is_column else parallel_state.get_tensor_model_parallel_rank()
            own.copy_(whole.chunk(ranks, dim=1)[place])
            self.b[name].zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """All As, [adapters × rank, input], and all Bs, [output, adapters × rank], of this rank's part of the layer."""
        names = list(self.a)
        blocks = []
        for name, rows in self._rows.items():
            if name in self.b:
                before = names.index(name) * self.rank
                after = (len(names) - 1) * self.rank - before
                blocks.append(F.pad(self.b[name], (before, after)))
            else:
                blocks.append(self.a[names[0]].new_zeros(rows, len(names) * self.rank))
        if self.entry.layout == "fused_qkv":
            return self.a[names[0]], blocks[0]
        size = self._config.tensor_model_parallel_size
        return torch.cat([self.a[name] for name in names]), merge(
            blocks, self.entry.layout, self._shape, size
        )

    def forward(self, x: Tensor) -> Tensor:
        """The adapter's output for input x."""
        a, b = self.factors()
        hidden = F.linear(x, a)
        if self.is_column and self._config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        elif self.is_column:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        elif self._config.sequence_parallel:
            hidden = reduce_scatter_to_sequence_parallel_region(hidden)
        else:
            hidden = reduce_from_tensor_model_parallel_region(hidden)
        return F.linear(hidden, b) * self.scale

    def added(self, linear: Any, inputs: tuple[Tensor, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward hook of the layer."""
        x = inputs[0]
        if (norm := getattr(linear, "layer_norm_weight", None)) is not None:  # the layer begins with its norm
            config = self._config
            x = rms_norm(x, norm, config.layernorm_epsilon, config.layernorm_zero_centered_gamma)
        return output[0] + self(x), *output[1:]

    @torch.no_grad()
    def merged(self) -> Tensor:
        """This rank's part of the layer's weight with the adapters in it; the layer's own stays as it is."""
        a, b = self.factors()
        weight = self.linear.weight.detach()
        return (weight.float() + self.scale * (b.float() @ a.float())).to(weight.dtype)

    def files(self) -> Iterator[tuple[Tensor, Parameter]]:
        """The matrices with PEFT's names for them, and how they are split."""
        layout: Layout = self.entry.layout if self.entry.layout in ("halves", "fused_qkv") else "plain"
        for module in modules_of(self.entry):
            if (name := last_word(module)) in self.a:
                yield (
                    self.a[name],
                    Parameter((f"{module}.lora_A.weight",), "plain", None if self.is_column else 1),
                )
                yield (
                    self.b[name],
                    Parameter((f"{module}.lora_B.weight",), layout, 0 if self.is_column else None),
                )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For checkpoints: how the matrices are split over tensor parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        kind, axis = ("b.", 0) if self.is_column else ("a.", 1)
        axes = {name: axis for name in state if name.startswith(kind)}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)
        if self.entry.layout == "halves":
            for name in axes:
                whole = sharded[prefix + name]
                sharded[prefix + name] = apply_swiglu_sharded_factory(whole, sharded_offsets)
        return sharded


class LayerAdapters(torch.nn.ModuleDict):
    """Those of a transformer layer, by the last word of the linear layer's name."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For checkpoints."""
        adapters: dict[str, Any] = dict(self.items())
        parts = [
            each.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
            for name, each in adapters.items()
        ]
        return {name: tensor for part in parts for name, tensor in part.items()}


def add_adapters(models: Sequence[GPTModel], shape: ModelShape, lora: Lora, seed: int) -> None:
    """Give the chunks of a new model adapters, and let nothing else of it be trained."""
    for model in models:
        model.requires_grad_(False)
        model.lora = lora
        for layer in model.decoder.layers:
            _add_to_layer(layer, shape, model.config, lora, seed)
        if model.pre_process and model.config.recompute_granularity:
            # Of what needs no gradient nothing is computed again, and no adapter in it would get one.
            model.embedding.register_forward_hook(_needing_a_gradient)


def _needing_a_gradient(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def _add_to_layer(layer: Any, shape: ModelShape, config: TransformerConfig, lora: Lora, seed: int) -> None:
    adapters = LayerAdapters()
    # PEFT takes names of dense MLPs for those of experts where a model has both.
    for path in _ATTENTION if shape.experts else (*_ATTENTION, *_MLP):
        linear = layer.get_submodule(path)
        entry = parameter(f"decoder.layers.{layer.layer_number - 1}.{path}.weight", shape)
        if not any(lora.is_target(last_word(name)) for name in modules_of(entry)):
            continue
        adapter = Adapter(linear, entry, shape, config, lora, seed)
        linear.register_forward_hook(adapter.added)
        adapters[last_word(path)] = adapter
    layer.add_module(_NAME, adapters)


def adapters_of(models: Sequence[torch.nn.Module]) -> list[Adapter]:
    """All of a model's chunks."""
    return [each for model in models for each in model.modules() if isinstance(each, Adapter)]


def reset_adapters(models: Sequence[torch.nn.Module]) -> None:
    """Make a model what its own weights are: adapters add nothing."""
    for adapter in adapters_of(models):
        adapter.reset()


def is_adapter(name: str) -> bool:
    """Whether a parameter, or a key of a checkpoint, is an adapter's."""
    return f".{_NAME}." in name


def modules_of(entry: Parameter) -> list[str]:
    """The Hugging Face modules whose weights a parameter holds."""
    return [name.removesuffix(".weight") for name in entry.hf_names]


def last_word(name: str) -> str:
    """Such as q_proj."""
    return name.rpartition(".")[2]
