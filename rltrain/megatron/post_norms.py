"""Layers that normalise the outputs of attention and MLP too, before they are added to the residual, as GLM-4's do.

Megatron-core has no such layer. The norms have the names that slime's Megatron gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

Output = tuple[Tensor, Tensor | None]  # of a linear layer, with its bias


class PostNormLayer(TransformerLayer):
    """A transformer layer with two more norms."""

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *, norm: type, **kwargs: Any
    ) -> None:
        """`norm` is the kind of the two; everything else is as for the plain layer."""
        super().__init__(config, submodules, **kwargs)
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.post_self_attn_layernorm = norm(config, size, eps=eps)
        self.post_mlp_layernorm = norm(config, size, eps=eps)
        self.self_attn_bda = _normed(build_module(submodules.self_attn_bda), self.post_self_attn_layernorm)
        self.mlp_bda = _normed(build_module(submodules.mlp_bda), self.post_mlp_layernorm)


def with_post_norms(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The same layers, each with the two norms, of the kind of the last one."""
    layers = [_with_post_norms(layer, block.layer_norm) for layer in block.layer_specs or []]
    return replace(block, layer_specs=layers)


def _with_post_norms(layer: ModuleSpec, norm: Any) -> ModuleSpec:
    return replace(layer, module=PostNormLayer, params={**layer.params, "norm": norm})


def _normed(add: Callable[..., Any], norm: torch.nn.Module) -> Callable[..., Any]:
    """Megatron-core's addition of bias, dropout and residual, of the normalised output."""

    def make(training: bool, fused: bool) -> Callable[[Output, Tensor, float], Tensor]:
        added = add(training, fused)

        def add_normed(output: Output, residual: Tensor, dropout: float) -> Tensor:
            value, bias = output
            return added((norm(value if bias is None else value + bias), None), residual, dropout)

        return add_normed

    return make
