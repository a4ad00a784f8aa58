"""OLMo, of the Allen Institute for AI."""

from __future__ import annotations

from rltrain.models.families.family import COMMON, Family
from rltrain.models.tensors import Parameter

OLMO = {
    "Olmo2ForCausalLM": Family(
        "olmo2",
        qk_norm=True,
        whole_qk_norm=True,
        pre_norms=False,
        post_norms=True,
        defaults=COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "pad_token_id": 1},
        tensors={
            "self_attention.q_layernorm.weight": Parameter(("self_attn.q_norm.weight",), "plain", 0),
            "self_attention.k_layernorm.weight": Parameter(("self_attn.k_norm.weight",), "plain", 0),
            "post_self_attn_layernorm.weight": Parameter(("post_attention_layernorm.weight",)),
            "post_mlp_layernorm.weight": Parameter(("post_feedforward_layernorm.weight",)),
        },
    ),
}
