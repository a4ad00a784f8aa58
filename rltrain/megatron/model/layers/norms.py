"""Norms that Megatron-core lacks: in plain torch, after attention and MLP, and over all heads at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from rltrain.megatron.model.layers import cpu_kernels

Output = tuple[Tensor, Tensor | None]  # of a linear layer, with its bias


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, told about sequence parallelism, which Megatron-core's wrapper of it refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_parameter_device(config))
        self.is_zero_centered = config.layernorm_zero_centered_gamma
        if self.is_zero_centered:
            torch.nn.init.zeros_(self.weight)
        # Its gradient is summed over tensor parallel ranks, each of which saw other tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input."""
        return rms_norm(x, self.weight, self.eps, self.is_zero_centered)


def rms_norm(x: Tensor, weight: Tensor, eps: float | None, is_zero_centered: bool) -> Tensor:
    """RMSNorm of the last dimension, times the weight or 1 + the weight."""
    if not is_zero_centered:
        if eps is not None and cpu_kernels.has_kernels(x) and weight.dtype == x.dtype:
            return cpu_kernels.rms_norm(x, weight, eps)
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.rms_norm(x.float(), (x.shape[-1],), 1 + weight.float(), eps).to(x.dtype)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm followed by a column parallel linear layer, named as TransformerEngine's fusion of the two."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.is_zero_centered = config.layernorm_zero_centered_gamma
        ones = torch.ones(input_size, dtype=config.params_dtype, device=_parameter_device(config))
        self.layer_norm_weight = torch.nn.Parameter(ones - 1 if self.is_zero_centered else ones)
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm_eps = config.layernorm_epsilon

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The linear layer's output and its bias, of the normalised input."""
        normed = rms_norm(x, self.layer_norm_weight, self.layer_norm_eps, self.is_zero_centered)
        return super().forward(normed, *args, **kwargs)


class WholeRMSNorm(torch.nn.Module):
    """RMSNorm of all heads of queries, or of keys, together. Tensor parallel ranks hold their heads' weights."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, heads: int, **kwargs: Any
    ) -> None:
        """`heads` counts those of all ranks; `hidden_size` is one head's."""
        super().__init__()
        own = heads // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(
            torch.ones(own * hidden_size, dtype=config.params_dtype, device=_parameter_device(config))
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self.eps, self.size, self.is_split = eps, heads * hidden_size, own != heads

    def forward(self, x: Tensor) -> Tensor:
        """`x` normalised, [..., heads of this rank, head_dim]."""
        flat = x.flatten(-2).float()
        total = flat.square().sum(-1, keepdim=True)
        if self.is_split:  # the sum over ranks, in the backward pass too
            total = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(total))
        normed = flat * torch.rsqrt(total / self.size + self.eps)
        return (self.weight.float() * normed).to(x.dtype).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For checkpoints: the weight is split over tensor parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0}, sharded_offsets
        )
        return sharded


def _parameter_device(config: TransformerConfig) -> torch.device:
    return torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda")


class PostNormLayer(TransformerLayer):
    """A layer that normalises the outputs of attention and MLP too, before they are added to the residual, like
    GLM-4's.

    Megatron-core has no such layer. The two norms have the names that slime's Megatron gives them.
    """

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


def _normed(add: Callable[..., Any], norm: torch.nn.Module) -> Callable[..., Any]:
    """Megatron-core's addition of bias, dropout and residual, of the normalised output."""

    def make(training: bool, fused: bool) -> Callable[[Output, Tensor, float], Tensor]:
        added = add(training, fused)

        def add_normed(output: Output, residual: Tensor, dropout: float) -> Tensor:
            value, bias = output
            return added((norm(value if bias is None else value + bias), None), residual, dropout)

        return add_normed

    return make
