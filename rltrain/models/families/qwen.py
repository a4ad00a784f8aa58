"""Alibaba's Qwen."""

from __future__ import annotations

from rltrain.models.experts import qwen2_experts, qwen3_experts
from rltrain.models.families.family import COMMON, NO_BIAS, Family
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
        tensors={
            "mlp.shared_experts.linear_fc1.weight": Parameter(
                ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"), "stacked", 0
            ),
            "mlp.shared_experts.linear_fc2.weight": Parameter(
                ("mlp.shared_expert.down_proj.weight",), "plain", 1
            ),
            "mlp.shared_experts.gate_weight": Parameter(("mlp.shared_expert_gate.weight",)),
        },
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
}
