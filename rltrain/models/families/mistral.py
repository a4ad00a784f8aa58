"""Mistral."""

from __future__ import annotations

from rltrain.models.families.family import COMMON, Family
from rltrain.models.windows import WindowRule

MISTRAL = {
    "MistralForCausalLM": Family(
        "mistral",
        null_head_dim=True,
        windows=WindowRule(),
        defaults=COMMON
        | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
}
