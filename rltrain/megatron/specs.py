"""Which modules a transformer layer is built from: TransformerEngine's, or plain torch with the same names.

Both name their parameters alike, so weight conversion, checkpoints and weight updates are one code path.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from rltrain.megatron.attention import PackedAttention
from rltrain.megatron.device import use_cuda
from rltrain.megatron.grouped_linear import ColumnGroupedLinear, RowGroupedLinear
from rltrain.megatron.post_norms import with_post_norms


def use_transformer_engine() -> bool:
    """Whether layers are TransformerEngine's: it is installed, and there is a GPU for it."""
    return HAVE_TE and use_cuda()


def decoder_spec(
    config: TransformerConfig, stage: int | None = None, *, post_norms: bool = False
) -> TransformerBlockSubmodules:
    """The decoder's layers on this pipeline rank, of one virtual stage if there are several.

    Args:
        post_norms: See `rltrain.megatron.post_norms`.
    """
    if use_transformer_engine():
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=stage)
    else:
        spec = _torch_block_spec(config, stage)
    return with_post_norms(spec) if post_norms else spec


def _torch_block_spec(config: TransformerConfig, stage: int | None) -> TransformerBlockSubmodules:
    first = get_transformer_layer_offset(config, vp_stage=stage)
    count = get_num_layers_to_build(config, vp_stage=stage)
    frequency = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [1] * config.num_layers
    layers = [
        _torch_layer_spec(config, config.num_moe_experts if frequency[i] else None)
        for i in range(first, first + count)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, told about sequence parallelism, which Megatron-core's wrapper of it refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_parameter_device(config))
        # Its gradient is summed over tensor parallel ranks, each of which saw other tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm followed by a column parallel linear layer, named as TransformerEngine's fusion of the two."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        ones = torch.ones(input_size, dtype=config.params_dtype, device=_parameter_device(config))
        self.layer_norm_weight = torch.nn.Parameter(ones)
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm_eps = config.layernorm_epsilon

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The linear layer's output and its bias, of the normalised input."""
        normed = F.rms_norm(x, (x.shape[-1],), self.layer_norm_weight, self.layer_norm_eps)
        return super().forward(normed, *args, **kwargs)


class TorchSpecProvider(BackendSpecProvider):
    """Plain torch modules for Megatron-core's spec builders."""

    def column_parallel_linear(self) -> type:
        """Linear layer split by output."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Linear layer split by input."""
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """The norm before a linear layer is part of its module."""
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        """Norm and linear layer in one."""
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Norms that stand alone."""
        return RMSNorm

    def core_attention(self) -> type:
        """Attention proper."""
        return PackedAttention

    def grouped_mlp_modules(self, *args: Any) -> tuple[type, MLPSubmodules]:
        """Experts, all of a rank in one module."""
        return TEGroupedMLP, MLPSubmodules(linear_fc1=ColumnGroupedLinear, linear_fc2=RowGroupedLinear)

    def activation_func(self) -> None:
        """The activation is a plain function of the configuration."""


def _torch_layer_spec(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    backend = TorchSpecProvider()
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_layer_norm_linear(),
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            # The norm before a dense MLP is part of its first linear layer; experts share one.
            pre_mlp_layernorm=RMSNorm if num_experts else IdentityOp,
            mlp=get_mlp_module_spec_for_backend(
                backend=backend, num_experts=num_experts, moe_grouped_gemm=True
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _parameter_device(config: TransformerConfig) -> torch.device:
    return torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda")
