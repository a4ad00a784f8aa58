"""Which modules a transformer layer is built from: TransformerEngine's, or plain torch with the same names.

Both name their parameters alike, so weight conversion, checkpoints and weight updates are one code path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

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
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from rltrain.megatron.device import use_cuda
from rltrain.megatron.model.attention import PackedAttention
from rltrain.megatron.model.experts import ColumnGroupedLinear, RowGroupedLinear
from rltrain.megatron.model.layers.delta_net import DeltaNetSubmodules, GatedDeltaNet
from rltrain.megatron.model.layers.gates import GatedSelfAttention
from rltrain.megatron.model.layers.latent import latent_attention
from rltrain.megatron.model.layers.norms import (
    LayerNormColumnParallelLinear,
    Output,
    PostNormLayer,
    RMSNorm,
    WholeRMSNorm,
)
from rltrain.megatron.model.layers.te_attention import sharing_attention
from rltrain.megatron.versions import experts_builder, with_submodules
from rltrain.models.families.family import Family
from rltrain.models.linear import LinearAttention


def use_transformer_engine() -> bool:
    """Whether layers are TransformerEngine's: it is installed, and there is a GPU for it."""
    return HAVE_TE and use_cuda()


def describe_layers() -> str:
    """Whose layers the trainer uses, for its log."""
    if use_transformer_engine():
        return f"layers: TransformerEngine {version('transformer-engine')}"
    if not use_cuda():
        return "layers: megatron-core's own, on the CPU"
    return (
        "layers: megatron-core's own. TransformerEngine is not installed: attention, norms and experts are slower, and"
        " there is no FP8. docs/gpu.md says how to install it."
    )


def decoder_spec(
    config: TransformerConfig,
    stage: int | None = None,
    *,
    family: Family | None = None,
    linear: LinearAttention | None = None,
    residual: float = 1.0,
    soft_cap: float | None = None,
) -> TransformerBlockSubmodules:
    """The decoder's layers on this pipeline rank, of one virtual stage if there are several.

    Args:
        family: What its layers have beside the plain ones; None: nothing.
        linear: Which layers have linear attention, and its sizes.
        residual: What the outputs of attention and MLP are multiplied by before they are added.
        soft_cap: Of attention's scores. TransformerEngine's attention has none, so ours is used.
    """
    if use_transformer_engine():
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=stage)
    else:
        spec = _torch_block_spec(config, stage)
    layers = list(spec.layer_specs or [])
    if use_transformer_engine():
        layers = [_with_shared_beginnings(each) for each in layers]
    if soft_cap is not None:
        layers = [_with_soft_cap(each, soft_cap) for each in layers]
    if residual != 1:
        layers = [_with_scaled_outputs(each, residual) for each in layers]
    if family is not None:
        layers = [_of_family(each, config, family, spec.layer_norm) for each in layers]
    if linear is not None:
        first = get_transformer_layer_offset(config, vp_stage=stage)
        layers = [
            _with_linear_attention(each, linear) if i in linear.layers else each
            for i, each in enumerate(layers, first)
        ]
    return replace(spec, layer_specs=layers)


def _of_family(layer: ModuleSpec, config: TransformerConfig, family: Family, norm: Any) -> ModuleSpec:
    """The layer with the family's attention and norms of the kind `norm`."""
    if family.sinks:  # TransformerEngine has none for packed sequences
        attention = with_submodules(layer.submodules.self_attention, core_attention=PackedAttention)
        layer = replace(layer, submodules=replace(layer.submodules, self_attention=attention))
    if family.output_gate:
        attention = replace(layer.submodules.self_attention, module=GatedSelfAttention)
        layer = replace(layer, submodules=replace(layer.submodules, self_attention=attention))
    if family.whole_qk_norm:
        layer = _with_whole_qk_norms(layer, config)
    if not family.pre_norms:
        layer = _without_pre_norms(layer)
    if family.post_norms:
        layer = replace(layer, module=PostNormLayer, params={**layer.params, "norm": norm})
    return layer


def _with_shared_beginnings(layer: ModuleSpec) -> ModuleSpec:
    """TransformerEngine's layer, whose attention also takes samples that share their beginnings."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    core = sharing_attention(TEDotProductAttention)
    attention = with_submodules(layer.submodules.self_attention, core_attention=core)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


def _with_linear_attention(layer: ModuleSpec, sizes: LinearAttention) -> ModuleSpec:
    backend = _backend()
    linear = DeltaNetSubmodules(
        in_proj=backend.column_parallel_layer_norm_linear(), out_proj=backend.row_parallel_linear()
    )
    attention = ModuleSpec(GatedDeltaNet, params={"sizes": sizes}, submodules=linear)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


def _with_soft_cap(layer: ModuleSpec, cap: float) -> ModuleSpec:
    core = ModuleSpec(PackedAttention, params={"soft_cap": cap})
    attention = with_submodules(layer.submodules.self_attention, core_attention=core)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


def _with_whole_qk_norms(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """Queries are normalised over all heads together, keys too."""
    heads = {"q_layernorm": config.num_attention_heads, "k_layernorm": config.num_query_groups}
    norms = {name: ModuleSpec(WholeRMSNorm, params={"heads": count}) for name, count in heads.items()}
    attention = with_submodules(layer.submodules.self_attention, **norms)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


def _without_pre_norms(layer: ModuleSpec) -> ModuleSpec:
    """Attention and MLP (not one with experts) take their inputs as they are."""
    linear = _backend().column_parallel_linear()
    attention = with_submodules(layer.submodules.self_attention, linear_qkv=linear)
    mlp = with_submodules(layer.submodules.mlp, linear_fc1=linear)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention, mlp=mlp))


def _backend() -> BackendSpecProvider:
    if not use_transformer_engine():
        return TorchSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _with_scaled_outputs(layer: ModuleSpec, factor: float) -> ModuleSpec:
    """The same layer, whose attention and MLP add `factor` times their outputs."""

    def scaled(training: bool, fused: bool) -> Callable[[Output, Tensor, float], Tensor]:
        added = get_bias_dropout_add(training, fused)

        def add_scaled(output: Output, residual: Tensor, dropout: float) -> Tensor:
            value, bias = output
            return added((value * factor, None if bias is None else bias * factor), residual, dropout)

        return add_scaled

    return replace(layer, submodules=replace(layer.submodules, self_attn_bda=scaled, mlp_bda=scaled))


def _torch_block_spec(config: TransformerConfig, stage: int | None) -> TransformerBlockSubmodules:
    first = get_transformer_layer_offset(config, vp_stage=stage)
    count = get_num_layers_to_build(config, vp_stage=stage)
    frequency = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [1] * config.num_layers
    layers = [
        _torch_layer_spec(config, config.num_moe_experts if frequency[i] else None)
        for i in range(first, first + count)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


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

    def grouped_mlp_modules(self, *args: Any) -> Any:
        """Experts, all of a rank in one module."""
        return experts_builder(ColumnGroupedLinear, RowGroupedLinear)

    def activation_func(self) -> None:
        """The activation is a plain function of the configuration."""


def _torch_layer_spec(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    backend = TorchSpecProvider()
    is_latent = config.multi_latent_attention
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
            # The norm before other attention is part of its first linear layer.
            input_layernorm=RMSNorm if is_latent else IdentityOp,
            self_attention=latent_attention(backend)
            if is_latent
            else ModuleSpec(
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
