"""Alibaba's Qwen."""

from __future__ import annotations

from typing import Any

from rltrain.models.experts import qwen2_experts, qwen3_experts
from rltrain.models.families.family import COMMON, NO_BIAS, Family
from rltrain.models.heads import Head
from rltrain.models.linear import DEFAULTS as LINEAR
from rltrain.models.linear import read_linear
from rltrain.models.tensors import Parameter
from rltrain.models.windows import WindowRule

_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096}
_LAST_LAYERS = WindowRule(
    lambda config, layer: bool(layer >= config["max_window_layers"]),
    reads=("max_window_layers",),
    switched=True,
    listed=True,
)
_SWITCH = {"use_sliding_window": (False, True)}

_SHARED_EXPERT = {
    "mlp.shared_experts.linear_fc1.weight": Parameter(
        ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"), "stacked", 0
    ),
    "mlp.shared_experts.linear_fc2.weight": Parameter(("mlp.shared_expert.down_proj.weight",), "plain", 1),
    "mlp.shared_experts.gate_weight": Parameter(("mlp.shared_expert_gate.weight",)),
}
_HYBRID: dict[str, Any] = {
    "qk_norm": True,
    "linear": read_linear,
    "output_gate": True,
    "zero_centered_norms": True,
    "partial_rotary": True,
    "extra_heads": True,
}
_GATED_QKV = {
    "self_attention.linear_qkv.weight": Parameter(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "gated_qkv", 0
    )
}
_FOUR_PROJECTIONS = {
    "self_attention.in_proj.weight": Parameter(
        tuple(f"linear_attn.in_proj_{name}.weight" for name in ("qkv", "z", "b", "a")), "delta", 0
    )
}
# transformers ignores these, and SGLang the first.
_GATED: dict[str, tuple[Any, ...]] = {
    "attn_output_gate": (None, True),
    "output_gate_type": (None, "swish", "silu"),
}

QWEN = {
    # It has biases whatever attention_bias says.
    "Qwen2ForCausalLM": Family(
        "qwen2",
        qkv_bias=True,
        windows=_LAST_LAYERS,
        only=_SWITCH,
        defaults=COMMON | _WINDOWS | {"num_key_value_heads": 32, "max_window_layers": 28},
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        qkv_bias="qkv_bias",
        experts=qwen2_experts,
        only={},
        defaults=COMMON
        | {
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "shared_expert_intermediate_size": 5632,
        },
        tensors=_SHARED_EXPERT,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        qk_norm=True,
        windows=_LAST_LAYERS,
        only=NO_BIAS | _SWITCH,
        defaults=COMMON | _WINDOWS | {"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28},
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        qk_norm=True,
        experts=qwen3_experts,
        windows=WindowRule(switched=True),
        only=NO_BIAS | _SWITCH,
        defaults=COMMON | _WINDOWS | {"num_key_value_heads": 4},
    ),
    "Qwen3NextForCausalLM": Family(
        "qwen3_next",
        **_HYBRID,
        head=Head(
            "mtp.layers.0.",
            token_norm="mtp.pre_fc_norm_embedding.weight",
            hidden_norm="mtp.pre_fc_norm_hidden.weight",
            projection="mtp.fc.weight",
            final_norm="mtp.norm.weight",
        ),
        experts=qwen2_experts,
        only=NO_BIAS | _GATED,
        defaults=COMMON
        | LINEAR
        | {
            "num_key_value_heads": 2,
            "head_dim": 256,
            "partial_rotary_factor": 0.25,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "norm_topk_prob": True,
        },
        tensors=_SHARED_EXPERT
        | _GATED_QKV
        | {
            "self_attention.in_proj.weight": Parameter(
                ("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"), "delta_by_head", 0
            )
        },
    ),
    # The text part of Qwen3.5.
    "Qwen3_5ForCausalLM": Family(
        "qwen3_5_text",
        **_HYBRID,
        only=NO_BIAS | _GATED,
        defaults=COMMON | LINEAR | {"num_key_value_heads": 4, "head_dim": 256, "partial_rotary_factor": 0.25},
        tensors=_GATED_QKV | _FOUR_PROJECTIONS,
    ),
    "Qwen3_5MoeForCausalLM": Family(
        "qwen3_5_moe_text",
        **_HYBRID,
        experts=qwen2_experts,
        # transformers ignores these, which a model may have been trained with.
        only=NO_BIAS
        | _GATED
        | {"norm_topk_prob": (True,), "mlp_only_layers": (None, []), "decoder_sparse_step": (None, 1)},
        defaults=COMMON
        | LINEAR
        | {
            "num_key_value_heads": 2,
            "head_dim": 256,
            "partial_rotary_factor": 0.25,
            "intermediate_size": None,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        tensors=_SHARED_EXPERT | _GATED_QKV | _FOUR_PROJECTIONS,
    ),
}
