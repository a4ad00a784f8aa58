"""Google's Gemma; its text models."""

from __future__ import annotations

from rltrain.models.families.family import COMMON, NO_BIAS, Family
from rltrain.models.tensors import Parameter
from rltrain.models.windows import WindowRule

_ONLY = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_act": (None, "silu", "gelu_pytorch_tanh"),  # not read
    "use_bidirectional_attention": (None, False),
}
_DEFAULTS = COMMON | {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "pad_token_id": 0,
}
_TENSORS = {
    "post_self_attn_layernorm.weight": Parameter(("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": Parameter(("pre_feedforward_layernorm.weight",)),
    "post_mlp_layernorm.weight": Parameter(("post_feedforward_layernorm.weight",)),
}

GEMMA = {
    "Gemma2ForCausalLM": Family(
        "gemma2",
        post_norms=True,
        zero_centered_norms=True,
        gelu=True,
        root_embedding=True,
        query_scalar=True,
        soft_caps=True,
        windows=WindowRule(lambda config, layer: layer % 2 == 0, listed=True, fixed=True, in_sglang=True),
        ropes=("default",),
        only=NO_BIAS | _ONLY,
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        tensors=_TENSORS,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        qk_norm=True,
        post_norms=True,
        zero_centered_norms=True,
        gelu=True,
        root_embedding=True,
        query_scalar=True,
        windows=WindowRule(
            lambda config, layer: bool((layer + 1) % (config["sliding_window_pattern"] or 1)),
            reads=("sliding_window_pattern",),
            listed=True,
            in_sglang=True,
        ),
        ropes=("default",),
        local_rope="rope_local_base_freq",
        only=NO_BIAS | _ONLY | {"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        },
        tensors=_TENSORS,
    ),
}
