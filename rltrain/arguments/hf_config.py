"""The shape of a model, from its Hugging Face `config.json`, and whether we can train it. Torch-free."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rltrain.arguments.groups.parallel import Parallel, virtual_stages
from rltrain.models.entries import whole_number
from rltrain.models.experts import Experts
from rltrain.models.families import FAMILIES, SUPPORTED_ARCHITECTURES
from rltrain.models.families.family import Family
from rltrain.models.heads import Head
from rltrain.models.latent import LatentAttention
from rltrain.models.lengths import Limit
from rltrain.models.linear import LinearAttention
from rltrain.models.quantised import fp8_block
from rltrain.models.rope import Rope, read_rope, read_ropes
from rltrain.models.scales import Multipliers, SoftCaps, read_multipliers, read_soft_caps
from rltrain.models.windows import Window, read_window
from rltrain.run.errors import UserError

_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with RMSNorm, SwiGLU, rotary embeddings and grouped query attention.

    Attributes:
        head: The layer for one token more, where it is trained.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    max_positions: int
    init_std: float
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None
    latent: LatentAttention | None = None
    linear: LinearAttention | None = None
    unrotated: tuple[int, ...] = ()  # layers without a rotary embedding, from 0
    window: Window | None = None
    local_theta: float | None = None  # base of the rotary embedding of layers with a window, if it is another
    multipliers: Multipliers = field(default_factory=Multipliers)
    soft_caps: SoftCaps = field(default_factory=SoftCaps)
    head: Head | None = None

    @property
    def limit(self) -> Limit | None:
        """How long sequences may be; None: as long as you like."""
        return (self.latent.limit if self.latent else None) or self.rope.limit

    @property
    def family(self) -> Family:
        """The properties that all models of its architecture share."""
        return FAMILIES[self.architecture]


def check_hf_config(config: dict[str, Any], parallel: Parallel, hf_checkpoint: str) -> None:
    """Refuse a model that the trainer cannot train as asked.

    Args:
        config: The parsed `config.json` of `hf_checkpoint`.
        parallel: How the ranks are split.
        hf_checkpoint: For the message.

    Raises:
        UserError: unsupported architecture or feature, or what the parallel sizes cannot divide.
    """
    shape = read_model_shape(config)
    size = parallel.tensor_model_parallel_size
    for what, count in (
        ("num_attention_heads", shape.num_heads),
        ("num_key_value_heads", shape.num_kv_heads),
        ("intermediate_size", shape.ffn_hidden_size),
    ):
        if count % size:
            raise UserError(
                f"--tensor-model-parallel-size {size} does not divide {what} {count} of {hf_checkpoint}:"
                " each tensor parallel rank takes an equal share. Use a size that divides all of"
                f" {shape.num_heads} heads, {shape.num_kv_heads} key-value heads and {shape.ffn_hidden_size}."
            )
    if shape.experts and shape.experts.shared_size % size:
        raise UserError(
            f"--tensor-model-parallel-size {size} does not divide the {shape.experts.shared_size} columns of the"
            f" shared experts of {hf_checkpoint}."
        )
    if shape.linear:
        _check_linear(shape.linear, parallel, hf_checkpoint)
    virtual_stages(parallel, shape.num_layers)
    _check_experts(shape.experts, parallel, hf_checkpoint)


def _check_linear(linear: LinearAttention, parallel: Parallel, hf_checkpoint: str) -> None:
    size = parallel.tensor_model_parallel_size
    if linear.key_heads % size:
        raise UserError(
            f"--tensor-model-parallel-size {size} does not divide linear_num_key_heads {linear.key_heads} of"
            f" {hf_checkpoint}: each tensor parallel rank takes an equal share of them."
        )
    if parallel.context_parallel_size > 1:
        raise UserError(
            f"--context-parallel-size {parallel.context_parallel_size}: {hf_checkpoint} has layers with linear"
            " attention, which read a sequence from its beginning, so ranks can't share one. Use"
            " --context-parallel-size 1, with more --tensor-model-parallel-size, or --recompute-granularity full."
        )


def _check_experts(experts: Experts | None, parallel: Parallel, hf_checkpoint: str) -> None:
    expert, tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if experts is None:
        if expert > 1 or (tensor or 1) > 1:
            raise UserError(
                f"--expert-model-parallel-size {expert} and --expert-tensor-parallel-size {tensor}: the model"
                f" {hf_checkpoint} has no experts."
            )
        return
    tensor = tensor or parallel.tensor_model_parallel_size
    if experts.biases and tensor > 1:
        raise UserError(
            f"the experts of {hf_checkpoint} have biases, with which Megatron-core can't split an expert: give"
            " --expert-tensor-parallel-size 1 (and --expert-model-parallel-size to share the experts out)."
        )
    for flag, size, what, count in (
        ("--expert-model-parallel-size", expert, "num_experts", experts.count),
        ("--expert-tensor-parallel-size", tensor, "moe_intermediate_size", experts.ffn_hidden_size),
    ):
        if count % size:
            raise UserError(f"{flag} {size} does not divide {what} {count} of {hf_checkpoint}.")
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} of a model with experts needs"
            " --sequence-parallel: without it every tensor parallel rank would send the same tokens."
        )


def read_model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a `config.json` describes.

    Raises:
        UserError: an architecture or a feature that the trainer does not support, or a missing or impossible entry.
    """
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    if missing := [key for key in _REQUIRED if key not in config and key not in family.defaults]:
        raise UserError(f"the model's config.json lacks {', '.join(missing)}.")
    if config.get("head_dim", 1) is None and not family.null_head_dim:
        raise UserError(
            "the model's config.json sets head_dim to null, which transformers can't use: leave it out."
        )
    config = with_defaults(config)
    refuse_features(config, architecture)
    num_layers = whole_number(config, "num_hidden_layers")
    latent = family.latent(config) if family.latent else None
    heads, kv_heads, head_dim = _heads(config, latent)
    if "partial_rotary_factor" not in config:  # MiniMax says it otherwise
        rotated = whole_number(config, "rotary_dim") if config.get("rotary_dim") is not None else head_dim
        config = {**config, "partial_rotary_factor": rotated / head_dim}
    experts = family.experts(config) if family.experts else None
    rope, local_theta = _ropes(config, family, latent=latent is not None)
    if rope.slower and len(rope.slower) != int(head_dim * rope.percent) // 2:
        raise UserError(
            f"the model's config.json has a short_factor of {len(rope.slower)} numbers; {int(head_dim * rope.percent)}"
            " rotated dimensions need half as many."
        )
    return ModelShape(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=whole_number(config, "hidden_size"),
        ffn_hidden_size=_mlp_size(config, family, experts),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=whole_number(config, "vocab_size"),
        norm_eps=config["rms_norm_eps"],
        rope=rope,
        local_theta=local_theta,
        tied_embeddings=bool(config["tie_word_embeddings"]),
        max_positions=whole_number(config, "max_position_embeddings"),
        init_std=config["initializer_range"],
        qkv_bias=bool(config[family.qkv_bias]) if isinstance(family.qkv_bias, str) else family.qkv_bias,
        qk_norm=bool(config[family.qk_norm]) if isinstance(family.qk_norm, str) else family.qk_norm,
        latent=latent,
        linear=family.linear(config) if family.linear else None,
        experts=experts,
        unrotated=_unrotated(config) if family.unrotated_layers else (),
        window=None if family.linear else read_window(config, family.windows, family.attention),
        multipliers=read_multipliers(config, family),
        soft_caps=read_soft_caps(config) if family.soft_caps else SoftCaps(),
    )


def _heads(config: Mapping[str, Any], latent: LatentAttention | None) -> tuple[int, int, int]:
    """How many heads attention has, how many of keys and values, and the size of each."""
    heads = kv_heads = whole_number(config, "num_attention_heads")
    head_dim = whole_number(config, "hidden_size") // heads
    if latent:
        head_dim = latent.plain_size + latent.rotated_size
    else:
        if config["num_key_value_heads"] is not None:
            kv_heads = whole_number(config, "num_key_value_heads")
        if config["head_dim"] is not None:
            head_dim = whole_number(config, "head_dim")
    if heads % kv_heads or head_dim % 2:
        raise UserError(
            f"the model's config.json has {heads} attention heads, {kv_heads} key-value heads and head_dim {head_dim}:"
            " key-value heads must divide the others, and the size must be even."
        )
    return heads, kv_heads, head_dim


def _mlp_size(config: Mapping[str, Any], family: Family, experts: Experts | None) -> int:
    """The width of dense MLPs; an expert's, if every layer has experts and the entry is missing."""
    if experts and config["intermediate_size"] is None and "intermediate_size" in family.defaults:
        return experts.ffn_hidden_size
    return whole_number(config, "intermediate_size")


def _ropes(config: Mapping[str, Any], family: Family, *, latent: bool) -> tuple[Rope, float | None]:
    """The rotary embedding of all layers; or of those without a window, and the base of the others'."""
    if family.usual_rope and all(config.get(style) is None for style in ("rope_scaling", "rope_parameters")):
        config = {**config, "rope_parameters": family.usual_rope}
    if family.local_rope is None:
        return read_rope(config, partial=family.partial_rotary, kinds=family.ropes, latent=latent), None
    both = read_ropes(config, family.local_rope)
    return both[0], both[1].theta


def _unrotated(config: Mapping[str, Any]) -> tuple[int, ...]:
    layers, rotated = config["num_hidden_layers"], config["no_rope_layers"]
    if read_rope(config, partial=False).kind == "yarn":
        raise UserError(
            "the model's config.json has YaRN and layers without rotary embedding: only one of the two is supported."
        )
    if rotated is None:
        interval = whole_number(config, "no_rope_layer_interval")
        return tuple(i for i in range(layers) if (i + 1) % interval == 0)
    if not isinstance(rotated, list) or len(rotated) != layers or any(each not in (0, 1) for each in rotated):
        raise UserError(
            f"the model's config.json has no_rope_layers {rotated}: it must have 0 or 1 for each of {layers} layers."
        )
    return tuple(i for i, each in enumerate(rotated) if not each)


def check_same_shape(config: Mapping[str, Any], standard: Mapping[str, Any], hf_checkpoint: str) -> None:
    """Refuse a `config.json` that means a different model to transformers.

    Args:
        standard: What transformers makes of `config`.
        hf_checkpoint: For the message.

    Raises:
        UserError: shows what differs.
    """
    ours, theirs = read_model_shape(config), read_model_shape(standard)
    fields = [each.name for each in dataclasses.fields(ModelShape)]
    different = [name for name in fields if getattr(ours, name) != getattr(theirs, name)]
    if different:
        shown = "; ".join(f"{name} {getattr(ours, name)} and {getattr(theirs, name)}" for name in different)
        raise UserError(
            f"{hf_checkpoint}/config.json means different models to the trainer and to transformers: {shown}. Let"
            " transformers write it again (`AutoConfig.from_pretrained(…).save_pretrained(…)`), and check these values."
        )


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` with what transformers takes for entries that it lacks."""
    family = FAMILIES.get((config.get("architectures") or [""])[0])
    return {**(family.defaults if family else {}), **config}


def _architecture(config: Mapping[str, Any]) -> str:
    names = [str(name) for name in config.get("architectures") or ()]
    if len(names) != 1 or names[0] not in SUPPORTED_ARCHITECTURES:
        _refuse_wrapper(config, names)
        found = ", ".join(names) or f"model_type {config.get('model_type')!r}"
        raise UserError(
            f"the model's config.json names the architecture {found}, which the trainer does not support;"
            f" supported are {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    expected = FAMILIES[names[0]].model_type
    if config.get("model_type") != expected:
        raise UserError(
            f"the model's config.json has model_type {config.get('model_type')!r} with the architecture {names[0]},"
            f" whose model_type is {expected!r}: transformers would follow one of them and SGLang the other."
        )
    return names[0]


def _refuse_wrapper(config: Mapping[str, Any], names: list[str]) -> None:
    """Say how to get at the text part of a model of text and images, if that can be trained."""
    text = config.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    for name, family in FAMILIES.items():
        if family.model_type == kind:
            raise UserError(
                f"the model's config.json belongs to {', '.join(names) or 'a wrapper'}, a model of text and images."
                f" The trainer supports its text part, a {name}: give a directory with that part alone."
                " docs/adding_a_model.md shows how to write Qwen3.5's."
            )


# What changes the computation, with the only value that is supported.
_ONLY: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (None, False),
    "text_config": (None,),
    "use_sliding_window": (None, False),
    "hidden_act": ("silu",),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "return_dict": (None, True),
    "dual_chunk_attention_config": (None,),
    "attention_chunk_size": (None,),
}


def refuse_features(config: Mapping[str, Any], architecture: str) -> None:
    """Refuse what would make the model compute something that the trainer does not.

    Args:
        config: With defaults.

    Raises:
        UserError: names the entry and its value.
    """
    for key, values in (_ONLY | dict(FAMILIES[architecture].only)).items():
        value = config.get(key)
        if not any(value == each and type(value) is type(each) for each in values):  # 1 == True
            raise UserError(
                f"the model's config.json sets {key} to {json.dumps(value)}, which the trainer does not support"
                f" for {architecture}."
            )
    if fp8_block(config) and any(each.of_all_experts for each in FAMILIES[architecture].tensors.values()):
        raise UserError(
            f"the model's config.json sets quantization_config: engines of {architecture} can't be given block FP8."
        )
    if (code := config.get("auto_map")) and not FAMILIES[architecture].same_as:
        raise UserError(
            f"the model's config.json names code of its own in auto_map ({code}), which the trainer does not run."
            f" If it is a {architecture} as transformers has it, remove auto_map."
        )
    padding, rows = config.get("pad_token_id"), config["vocab_size"]
    if isinstance(padding, int) and isinstance(rows, int) and not -rows <= padding < rows:
        raise UserError(
            f"the model's config.json has pad_token_id {padding}, but a vocab_size of {rows}: transformers refuses it."
            " Set pad_token_id to null."
        )
