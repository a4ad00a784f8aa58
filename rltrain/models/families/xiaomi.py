"""Xiaomi's MiMo."""

from __future__ import annotations

from dataclasses import replace

from rltrain.models.families.qwen import QWEN
from rltrain.models.heads import Head

XIAOMI = {
    # MiMo-7B: Qwen2 with heads for further tokens. Its code is not run.
    "MiMoForCausalLM": replace(
        QWEN["Qwen2ForCausalLM"],
        model_type="mimo",
        same_as="qwen2",
        extra_heads=True,
        head=Head(
            "model.mtp_layers.0.",
            token_norm="model.mtp_layers.0.token_layernorm.weight",
            hidden_norm="model.mtp_layers.0.hidden_layernorm.weight",
            projection="model.mtp_layers.0.input_proj.weight",
            final_norm="model.mtp_layers.0.final_layernorm.weight",
            hidden_first=True,
        ),
    ),
}
