"""DeepSeek-V3 and R1, and the models of Moonshot that are built alike: Moonlight and Kimi-K2."""

from __future__ import annotations

from dataclasses import replace

from rltrain.models.experts import deepseek_experts, first_or_listed_experts
from rltrain.models.families.family import COMMON, NO_BIAS, Family
from rltrain.models.heads import BEHIND
from rltrain.models.latent import DEFAULTS, read_indexed_latent, read_latent

_V3 = {
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3",
        experts=deepseek_experts,
        latent=read_latent,
        extra_heads=True,
        head=BEHIND,
        only=NO_BIAS
        | {
            "rope_interleave": (True,),
            # transformers ignores these three, which a model may have been trained with.
            "scoring_func": (None, "sigmoid"),
            "topk_method": (None, "noaux_tc"),
            "moe_layer_freq": (None, 1),
        },
        defaults=COMMON
        | DEFAULTS
        | {
            "num_key_value_heads": 128,
            "max_position_embeddings": 4096,
            "rope_interleave": True,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "moe_intermediate_size": 2048,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
        },
    ),
}
_V3_2 = replace(
    _V3["DeepseekV3ForCausalLM"],
    model_type="deepseek_v32",
    head=None,  # its indexer is not trained
    latent=read_indexed_latent,
    experts=first_or_listed_experts,
    attention="indexed_attention",
    defaults={
        **_V3["DeepseekV3ForCausalLM"].defaults,
        "max_position_embeddings": 163840,
        "mlp_layer_types": None,
        "index_topk": 2048,
        "index_n_heads": 64,
        "index_head_dim": 128,
    },
)
DEEPSEEK = _V3 | {"DeepseekV32ForCausalLM": _V3_2}
