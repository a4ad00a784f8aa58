"""IBM's Granite."""

from __future__ import annotations

from rltrain.models.families.family import COMMON, Family

GRANITE = {
    "GraniteForCausalLM": Family(
        "granite",
        multipliers=True,
        defaults=COMMON
        | {
            "max_position_embeddings": 2048,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
}
