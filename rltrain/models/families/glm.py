"""Zhipu's GLM."""

from __future__ import annotations

from rltrain.models.experts import deepseek_experts, first_or_listed_experts, listed_experts
from rltrain.models.families.family import COMMON, NO_BIAS, Family
from rltrain.models.heads import BEHIND
from rltrain.models.latent import DEFAULTS, read_indexed_latent, read_latent
from rltrain.models.tensors import Parameter

GLM = {
    "Glm4ForCausalLM": Family(
        "glm4",
        qkv_bias="attention_bias",
        post_norms=True,
        rotary_interleaved=True,
        partial_rotary=True,
        only={"attention_bias": (True, False)},
        defaults=COMMON
        | {
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1.5625e-07,
            "max_position_embeddings": 131072,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "pad_token_id": 151329,
        },
        tensors={"mlp.linear_fc1.weight": Parameter(("mlp.gate_up_proj.weight",), "halves", 0)},
    ),
    # 4.5, 4.6 and 4.7.
    "Glm4MoeForCausalLM": Family(
        "glm4_moe",
        qkv_bias="attention_bias",
        qk_norm="use_qk_norm",
        experts=deepseek_experts,
        partial_rotary=True,
        extra_heads=True,
        head=BEHIND,
        only={"attention_bias": (True, False), "use_qk_norm": (True, False)},
        defaults=COMMON
        | {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": False,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
    ),
    # 4.7 Flash.
    "Glm4MoeLiteForCausalLM": Family(
        "glm4_moe_lite",
        experts=listed_experts,
        latent=read_latent,
        extra_heads=True,
        head=BEHIND,
        only=NO_BIAS
        | {
            "rope_interleave": (True,),
            "scoring_func": (None, "sigmoid"),
            "topk_method": (None, "noaux_tc"),
        },
        defaults=COMMON
        | DEFAULTS
        | {
            "num_key_value_heads": 20,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 202752,
            "rope_interleave": True,
            "q_lora_rank": 768,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "n_routed_experts": 64,
            "moe_intermediate_size": 1536,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.8,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": None,
            "norm_topk_prob": True,
        },
    ),
    # 5
    "GlmMoeDsaForCausalLM": Family(
        "glm_moe_dsa",
        experts=first_or_listed_experts,
        latent=read_indexed_latent,
        attention="indexed_attention",
        extra_heads=True,
        only=NO_BIAS
        | {
            "rope_interleave": (None, True),
            "scoring_func": (None, "sigmoid"),
            "topk_method": (None, "noaux_tc"),
            "moe_layer_freq": (None, 1),
        },
        defaults=COMMON
        | DEFAULTS
        | {
            "num_key_value_heads": 64,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 202752,
            "q_lora_rank": 2048,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "n_routed_experts": 256,
            "moe_intermediate_size": 2048,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 3,
            "mlp_layer_types": None,
            "norm_topk_prob": True,
            "index_topk": 2048,
            "index_n_heads": 32,
            "index_head_dim": 128,
        },
    ),
}
