"""Microsoft's Phi."""

from __future__ import annotations

from rltrain.models.families.family import COMMON, Family
from rltrain.models.tensors import Parameter
from rltrain.models.windows import WindowRule

PHI = {
    # Phi-3 and Phi-4, those of 128k tokens with longrope.
    "Phi3ForCausalLM": Family(
        "phi3",
        partial_rotary=True,
        partial_beside=True,
        windows=WindowRule(),
        ropes=("default", "longrope"),
        # It has no biases, whatever attention_bias says.
        only={"attention_bias": (None, False, True), "resid_pdrop": (0.0, 0), "embd_pdrop": (0.0, 0)},
        defaults=COMMON
        | {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "sliding_window": None,
            "pad_token_id": 32000,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
        tensors={
            "self_attention.linear_qkv.weight": Parameter(("self_attn.qkv_proj.weight",), "fused_qkv", 0),
            "mlp.linear_fc1.weight": Parameter(("mlp.gate_up_proj.weight",), "halves", 0),
        },
    ),
}
