"""The model: its directory, precision and memory, and Megatron's flags of its shape.

The shape comes from the `config.json` of `--hf-checkpoint`; flags of a shape that are given must say the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rltrain.arguments.declare import Owner, flag, worked_out
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Model:
    """Model."""

    hf_checkpoint: str = flag("Hugging Face directory: shape, tokenizer and first weights", metavar="DIR")
    random_init: bool = flag("start from random weights (seed: --seed)", False, owner="slurmlime")
    bf16: bool = flag(
        "bf16 weights with fp32 master weights (default: with GPUs; fp32 on a CPU)", owner="Megatron"
    )
    recompute_granularity: Literal["full", "selective"] | None = flag(
        "recompute activations in the backward pass", owner="Megatron"
    )
    recompute_method: Literal["uniform", "block"] | None = flag("with full recomputation", owner="Megatron")
    recompute_num_layers: int | None = flag("with full recomputation", metavar="N", owner="Megatron")
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = flag(
        "how tokens reach their experts; flex needs GPUs and DeepEP (default: alltoall)",
        "alltoall",
        owner="Megatron",
    )
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"] = flag(
        "how the load of experts is balanced (default: aux_loss, with --moe-aux-loss-coeff)",
        "aux_loss",
        owner="Megatron",
    )
    moe_aux_loss_coeff: float = flag(
        "weight of the load-balancing loss (default: 0, off)", 0.0, metavar="C", owner="Megatron"
    )
    make_vocab_size_divisible_by: int = flag(
        "pad the vocabulary to a multiple of this on every tensor parallel rank (default: 1)",
        1,
        metavar="N",
        owner="Megatron",
    )
    megatron: dict[str, dict[str, Any]] = worked_out({})  # handed on to megatron-core, by class and field


@dataclass(frozen=True)
class Shape:
    """Shape of the model.

    From --hf-checkpoint where left out; what is given must be equal to it:
    """

    owner: ClassVar[Owner] = "Megatron"

    num_layers: int | None = flag(None)
    hidden_size: int | None = flag(None)
    ffn_hidden_size: int | None = flag(None)
    num_attention_heads: int | None = flag(None)
    group_query_attention: bool | None = flag(None)
    num_query_groups: int | None = flag(None)
    kv_channels: int | None = flag(None)
    vocab_size: int | None = flag(None)
    normalization: str | None = flag(None)
    norm_epsilon: float | None = flag(None)
    swiglu: bool | None = flag(None)
    disable_bias_linear: bool | None = flag(None)
    add_qkv_bias: bool | None = flag(None)
    qk_layernorm: bool | None = flag(None)
    post_self_attn_layernorm: bool | None = flag(None)
    post_mlp_layernorm: bool | None = flag(None)
    position_embedding_type: str | None = flag(None)
    use_rotary_position_embeddings: bool | None = flag(None)
    rotary_base: float | None = flag(None)
    rotary_percent: float | None = flag(None)
    rotary_interleaved: bool | None = flag(None)
    use_rope_scaling: bool | None = flag(None)
    rope_scaling_factor: float | None = flag(None)
    untie_embeddings_and_output_weights: bool | None = flag(None)
    attention_dropout: float | None = flag(None)
    hidden_dropout: float | None = flag(None)
    num_experts: int | None = flag(None)
    moe_ffn_hidden_size: int | None = flag(None)
    moe_router_topk: int | None = flag(None)
    moe_shared_expert_intermediate_size: int | None = flag(None)
    moe_shared_expert_gate: bool | None = flag(None)
    moe_router_score_function: str | None = flag(None)
    moe_router_enable_expert_bias: bool | None = flag(None)
    moe_router_num_groups: int | None = flag(None)
    moe_router_group_topk: int | None = flag(None)
    moe_router_topk_scaling_factor: float | None = flag(None)
    moe_layer_freq: str | None = flag(None)
    moe_router_pre_softmax: bool | None = flag(None)
    multi_latent_attention: bool | None = flag(None)
    q_lora_rank: int | None = flag(None)
    kv_lora_rank: int | None = flag(None)
    qk_head_dim: int | None = flag(None)
    qk_pos_emb_head_dim: int | None = flag(None)
    v_head_dim: int | None = flag(None)
    rotary_scaling_factor: float | None = flag(None)
    mscale: float | None = flag(None)
    mscale_all_dim: float | None = flag(None)
    rope_type: str | None = flag(None)
    apply_layernorm_1p: bool | None = flag(None)
    attention_output_gate: bool | None = flag(None)
    linear_attention_freq: str | None = flag(None)
    linear_conv_kernel_dim: int | None = flag(None)
    linear_key_head_dim: int | None = flag(None)
    linear_value_head_dim: int | None = flag(None)
    linear_num_key_heads: int | None = flag(None)
    linear_num_value_heads: int | None = flag(None)


def check_recomputation(model: Model) -> None:
    """Refuse full recomputation without its two settings.

    Raises:
        UserError: names the flags.
    """
    if model.recompute_granularity == "full" and not (model.recompute_method and model.recompute_num_layers):
        raise UserError("--recompute-granularity full needs --recompute-method and --recompute-num-layers.")
