"""Xiaomi's MiMo."""

from __future__ import annotations

from dataclasses import replace

from rltrain.models.families.qwen import QWEN

XIAOMI = {
    # MiMo-7B: Qwen2 with heads for further tokens. Its code is not run.
    "MiMoForCausalLM": replace(
        QWEN["Qwen2ForCausalLM"], model_type="mimo", same_as="qwen2", extra_heads=True
    ),
}
