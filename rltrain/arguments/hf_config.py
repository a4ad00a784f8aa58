"""The shape of a model, read from its Hugging Face `config.json`, and whether we can train it. Torch-free."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from rltrain.arguments.errors import UserError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")

# Megatron-core's rotary embedding takes only the factor; the rest is fixed to what Llama 3 uses.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with RMSNorm, SwiGLU, rotary embeddings and grouped query attention."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_factor: float | None  # Llama 3's scaling of the rotary embedding
    tied_embeddings: bool
    max_positions: int
    init_std: float

    @property
    def qkv_bias(self) -> bool:
        """Biases on the query, key and value projections."""
        return self.architecture == "Qwen2ForCausalLM"

    @property
    def qk_norm(self) -> bool:
        """RMSNorm on each head's query and key."""
        return self.architecture == "Qwen3ForCausalLM"


def check_hf_config(config: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse a model that the trainer cannot train as asked.

    Args:
        config: The parsed `config.json` of `args.hf_checkpoint`.
        args: Needs `tensor_model_parallel_size` and `hf_checkpoint`.

    Raises:
        UserError: unsupported architecture or feature, or heads that tensor parallelism cannot divide.
    """
    shape = read_model_shape(config)
    size = args.tensor_model_parallel_size
    for what, count in (
        ("num_attention_heads", shape.num_heads),
        ("num_key_value_heads", shape.num_kv_heads),
        ("intermediate_size", shape.ffn_hidden_size),
    ):
        if count % size:
            raise UserError(
                f"--tensor-model-parallel-size {size} does not divide {what} {count} of {args.hf_checkpoint}:"
                " each tensor parallel rank takes an equal share of them. Use a size that divides all of"
                f" {shape.num_heads} heads, {shape.num_kv_heads} key-value heads and {shape.ffn_hidden_size}."
            )


def read_model_shape(config: dict[str, Any]) -> ModelShape:
    """The shape that a `config.json` describes.

    Raises:
        UserError: an architecture or a feature that the trainer does not support, or a missing entry.
    """
    architecture = _architecture(config)
    _refuse_features(config, architecture)
    if missing := [key for key in _REQUIRED if key not in config]:
        raise UserError(f"the model's config.json lacks {', '.join(missing)}.")
    heads = config["num_attention_heads"]
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return ModelShape(
        architecture=architecture,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        rope_factor=_rope_factor(rope),
        tied_embeddings=config.get("tie_word_embeddings", False),
        max_positions=config.get("max_position_embeddings", 32768),
        init_std=config.get("initializer_range", 0.02),
    )


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures") or []
    if len(names) != 1 or names[0] not in SUPPORTED_ARCHITECTURES:
        found = ", ".join(names) or f"model_type {config.get('model_type')!r}"
        raise UserError(
            f"the model's config.json names the architecture {found}, which the trainer does not support;"
            f" supported are {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    return names[0]


def _refuse_features(config: dict[str, Any], architecture: str) -> None:
    for key in ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config"):
        if config.get(key):
            raise UserError(f"the model's config.json sets {key}, which the trainer does not support.")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(
            f"the model's config.json has hidden_act {activation!r}; the trainer supports only 'silu'"
            f" for {architecture}."
        )


def _rope_factor(rope: dict[str, Any]) -> float | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(
            f"the model's config.json scales rotary embeddings with rope_type {kind!r}; supported are"
            " 'default' and 'llama3'."
        )
    for key, value in _LLAMA3_ROPE.items():
        if rope.get(key, value) != value:
            raise UserError(
                f"the model's config.json sets {key} {rope[key]} for llama3 rotary embeddings; Megatron-core"
                f" knows only {value}."
            )
    return float(rope["factor"])
