"""OpenAI's gpt-oss."""

from __future__ import annotations

from rltrain.models.experts import gpt_oss_experts
from rltrain.models.families.family import COMMON, Family
from rltrain.models.tensors import Parameter
from rltrain.models.windows import WindowRule

_EXPERTS = "mlp.experts."
OPENAI = {
    "GptOssForCausalLM": Family(
        "gpt_oss",
        qkv_bias=True,
        biases=True,
        sinks=True,
        experts=gpt_oss_experts,
        windows=WindowRule(lambda config, layer: layer % 2 == 0, listed=True, in_sglang=True),
        usual_rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        only={
            "attention_bias": (True,),
            "swiglu_alpha": (1.702,),  # SGLang knows no other
        },
        defaults=COMMON
        | {
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "rope_theta": 150000.0,
            "attention_bias": True,
            "sliding_window": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        tensors={
            "self_attention.linear_proj.bias": Parameter(("self_attn.o_proj.bias",)),
            "self_attention.core_attention.softmax_offset": Parameter(("self_attn.sinks",), "plain", 0),
            "mlp.router.weight": Parameter(("mlp.router.weight",)),
            "mlp.router.bias": Parameter(("mlp.router.bias",)),
            "mlp.experts.linear_fc1.weight": Parameter(
                (f"{_EXPERTS}gate_up_proj",), "woven", is_expert=True, of_all_experts=True
            ),
            "mlp.experts.linear_fc1.bias": Parameter(
                (f"{_EXPERTS}gate_up_proj_bias",), "woven", is_expert=True, of_all_experts=True
            ),
            "mlp.experts.linear_fc2.weight": Parameter(
                (f"{_EXPERTS}down_proj",), "transposed", is_expert=True, of_all_experts=True
            ),
            "mlp.experts.linear_fc2.bias": Parameter(
                (f"{_EXPERTS}down_proj_bias",), is_expert=True, of_all_experts=True
            ),
        },
    ),
}
