"""Hugging Face's SmolLM."""

from __future__ import annotations

from rltrain.models.families.family import COMMON, Family

SMOLLM = {
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        unrotated_layers=True,
        defaults=COMMON
        | {
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "pad_token_id": 128004,
        },
    ),
}
