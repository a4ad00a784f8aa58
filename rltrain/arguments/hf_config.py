"""The shape of a model, read from its Hugging Face `config.json`, and whether we can train it. Torch-free."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rltrain.arguments.errors import UserError
from rltrain.arguments.parallel import virtual_stages


@dataclass(frozen=True)
class Family:
    """What sets an architecture apart from the others; adding one is adding a line to `FAMILIES`."""

    qkv_bias: bool = False  # on the query, key and value projections
    qk_norm: bool = False  # RMSNorm on each head's query and key
    experts: bool = False
    post_norms: bool = False  # RMSNorm also on the outputs of attention and MLP, before they are added
    fused_gate_up: bool = False  # the MLP's gate and up projections are one tensor
    rotary_interleaved: bool = False  # neighbours are rotated with each other, not halves
    rotary_percent: float = 1.0  # share of a head that is rotated, where config.json does not say


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm=True),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, experts=True),
    "Glm4ForCausalLM": Family(
        qkv_bias=True, post_norms=True, fused_gate_up=True, rotary_interleaved=True, rotary_percent=0.5
    ),
}
SUPPORTED_ARCHITECTURES = tuple(FAMILIES)

_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")

# Megatron-core's rotary embedding takes only the factor; the rest is fixed to what Llama 3 uses.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP in some layers.

    Attributes:
        top_k: Experts of a token.
        normalized: Whether the weights of a token's experts add up to 1.
        layers: The layers that have experts, from 0.
    """

    count: int
    top_k: int
    ffn_hidden_size: int
    normalized: bool
    layers: tuple[int, ...]


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
    rotary_percent: float = 1.0  # share of a head's dimensions that is rotated
    experts: Experts | None = None

    @property
    def family(self) -> Family:
        """What it has in common with every model of its architecture."""
        return FAMILIES[self.architecture]


def check_hf_config(config: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse a model that the trainer cannot train as asked.

    Args:
        config: The parsed `config.json` of `args.hf_checkpoint`.
        args: Needs the parallel sizes and `hf_checkpoint`.

    Raises:
        UserError: unsupported architecture or feature, or what the parallel sizes cannot divide.
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
    virtual_stages(args, shape.num_layers)
    _check_experts(shape.experts, args)


def _check_experts(experts: Experts | None, args: argparse.Namespace) -> None:
    expert, tensor = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    if experts is None:
        if expert > 1 or (tensor or 1) > 1:
            raise UserError(
                f"--expert-model-parallel-size {expert} and --expert-tensor-parallel-size {tensor}: the model"
                f" {args.hf_checkpoint} has no experts."
            )
        return
    tensor = tensor or args.tensor_model_parallel_size
    for flag, size, what, count in (
        ("--expert-model-parallel-size", expert, "num_experts", experts.count),
        ("--expert-tensor-parallel-size", tensor, "moe_intermediate_size", experts.ffn_hidden_size),
    ):
        if count % size:
            raise UserError(f"{flag} {size} does not divide {what} {count} of {args.hf_checkpoint}.")
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise UserError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} of a model with experts needs"
            " --sequence-parallel: without it every tensor parallel rank would send the same tokens."
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
        rotary_percent=rotary_percent(config),
        experts=_experts(config) if FAMILIES[architecture].experts else None,
    )


def rotary_percent(config: Mapping[str, Any]) -> float:
    """The share of each head's dimensions that rotary embeddings rotate."""
    architecture = (config.get("architectures") or [""])[0]
    usual = FAMILIES.get(architecture, Family()).rotary_percent
    rope = config.get("rope_parameters") or {}
    return rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or usual


def _experts(config: dict[str, Any]) -> Experts:
    # transformers 5 writes another name than the published configurations have
    config = {"num_experts": config.get("num_local_experts"), **config}
    wanted = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    if missing := [key for key in wanted if not config.get(key)]:
        raise UserError(f"the model's config.json lacks {', '.join(missing)}.")
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    return Experts(
        count=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        ffn_hidden_size=config["moe_intermediate_size"],
        normalized=config.get("norm_topk_prob", False),
        layers=tuple(i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0),
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
    family = FAMILIES[architecture]
    for key in ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config"):
        if config.get(key) and not (key == "attention_bias" and family.qkv_bias):
            raise UserError(f"the model's config.json sets {key}, which the trainer does not support.")
    if architecture == "Glm4ForCausalLM" and config.get("attention_bias") is False:
        raise UserError(
            "the model's config.json sets attention_bias to false: the trainer gives a GLM-4 biases."
        )
    if family.rotary_percent == 1.0 and rotary_percent(config) != 1.0:
        raise UserError(
            f"the model's config.json sets partial_rotary_factor {rotary_percent(config)}, which the trainer does"
            f" not support for {architecture}."
        )
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
