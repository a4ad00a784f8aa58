"""Meta's Llama."""

from __future__ import annotations

from rltrain.models.families.family import COMMON, Family

LLAMA = {
    "LlamaForCausalLM": Family(
        "llama", null_head_dim=True, defaults=COMMON | {"max_position_embeddings": 2048}
    ),
}
