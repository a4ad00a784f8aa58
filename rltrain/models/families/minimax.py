"""MiniMax-M2."""

from __future__ import annotations

from rltrain.models.experts import minimax_experts
from rltrain.models.families.family import COMMON, NO_BIAS, Family
from rltrain.models.tensors import Parameter

_ROUTER = "block_sparse_moe"
MINIMAX = {
    "MiniMaxM2ForCausalLM": Family(
        "minimax_m2",
        qk_norm=True,
        whole_qk_norm=True,
        experts=minimax_experts,
        partial_rotary=True,
        extra_heads=True,
        only=NO_BIAS
        | {
            "router_jitter_noise": (0.0,),
            # transformers ignores these, which a model may have been trained with.
            "scoring_func": (None, "sigmoid"),
            "use_routing_bias": (None, True),
            "use_qk_norm": (None, True),
            "qk_norm_type": (None, "per_layer"),
            "shared_intermediate_size": (None, 0),
        },
        defaults={name: value for name, value in COMMON.items() if name != "partial_rotary_factor"}
        | {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 196608,
            "rope_theta": 5000000.0,
            "num_experts_per_tok": 8,
            "router_jitter_noise": 0.0,
        },
        tensors={
            "self_attention.q_layernorm.weight": Parameter(("self_attn.q_norm.weight",), "plain", 0),
            "self_attention.k_layernorm.weight": Parameter(("self_attn.k_norm.weight",), "plain", 0),
            "mlp.router.weight": Parameter((f"{_ROUTER}.gate.weight",)),
            "mlp.router.expert_bias": Parameter((f"{_ROUTER}.e_score_correction_bias",)),
            "mlp.experts.linear_fc1.weight": Parameter(
                (f"{_ROUTER}.experts.{{}}.w1.weight", f"{_ROUTER}.experts.{{}}.w3.weight"),
                "stacked",
                0,
                is_expert=True,
            ),
            "mlp.experts.linear_fc2.weight": Parameter(
                (f"{_ROUTER}.experts.{{}}.w2.weight",), "plain", 1, is_expert=True
            ),
        },
    ),
}
