"""Megatron's flags of a model's shape, as slime's model scripts give them.

They may be left out: the shape comes from the Hugging Face `config.json`. Those that are given must say the same.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any

from rltrain.arguments.errors import UserError
from rltrain.arguments.hf_config import FAMILIES, Family, rotary_percent

# flag → kind of its value, None for a switch that means True
_FLAGS: dict[str, Callable[[str], Any] | None] = {
    "num-layers": int, "hidden-size": int, "ffn-hidden-size": int, "num-attention-heads": int,
    "group-query-attention": None, "num-query-groups": int, "kv-channels": int, "vocab-size": int,
    "normalization": str, "norm-epsilon": float, "swiglu": None, "disable-bias-linear": None, "add-qkv-bias": None,
    "qk-layernorm": None, "post-self-attn-layernorm": None, "post-mlp-layernorm": None,
    "position-embedding-type": str, "use-rotary-position-embeddings": None,
    "rotary-base": float, "rotary-percent": float, "rotary-interleaved": None, "use-rope-scaling": None,
    "rope-scaling-factor": float, "untie-embeddings-and-output-weights": None, "attention-dropout": float,
    "hidden-dropout": float, "num-experts": int, "moe-ffn-hidden-size": int, "moe-router-topk": int,
    "moe-shared-expert-intermediate-size": int, "moe-router-score-function": str, "moe-layer-freq": str,
    "moe-router-pre-softmax": None,
}  # fmt: skip


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add them; `--help` says once what they are."""
    group = parser.add_argument_group(
        "megatron: shape of the model",
        "From --hf-checkpoint where left out; what is given must be equal to it: "
        + " ".join(f"--{flag}" for flag in _FLAGS),
    )
    for flag, kind in _FLAGS.items():
        if kind is None:
            group.add_argument(f"--{flag}", action="store_true", default=None, help=argparse.SUPPRESS)
        else:
            group.add_argument(f"--{flag}", type=kind, help=argparse.SUPPRESS)
    group.add_argument("--make-vocab-size-divisible-by", type=int, default=1, metavar="N",
        help="pad the vocabulary to a multiple of this on every tensor parallel rank (default: 1)")  # fmt: skip


def megatron_shape(config: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """What Megatron's shape flags would have to say for a `config.json`.

    Returns:
        Flag without dashes → its value, and where in `config.json` it comes from. A switch that is off is False.
    """
    family = FAMILIES.get((config.get("architectures") or [""])[0], Family())
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    scaled = (rope.get("rope_type") or rope.get("type") or "default") == "llama3"
    tied = bool(config.get("tie_word_embeddings", False))
    shape: dict[str, tuple[Any, str]] = {
        "num-layers": (config["num_hidden_layers"], "num_hidden_layers"),
        "hidden-size": (hidden, "hidden_size"),
        "ffn-hidden-size": (config["intermediate_size"], "intermediate_size"),
        "num-attention-heads": (heads, "num_attention_heads"),
        "group-query-attention": (groups != heads, "num_key_value_heads"),
        "num-query-groups": (groups, "num_key_value_heads"),
        "kv-channels": (config.get("head_dim") or hidden // heads, "head_dim"),
        "vocab-size": (config["vocab_size"], "vocab_size"),
        "normalization": ("RMSNorm", "architectures"),
        "norm-epsilon": (config.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        "swiglu": (config.get("hidden_act", "silu") == "silu", "hidden_act"),
        "disable-bias-linear": (not config.get("mlp_bias", False), "mlp_bias"),
        "add-qkv-bias": (family.qkv_bias or bool(config.get("attention_bias")), "architectures"),
        "qk-layernorm": (family.qk_norm, "architectures"),
        "post-self-attn-layernorm": (family.post_norms, "architectures"),
        "post-mlp-layernorm": (family.post_norms, "architectures"),
        "position-embedding-type": ("rope", "architectures"),
        "use-rotary-position-embeddings": (True, "architectures"),
        "rotary-base": (rope.get("rope_theta") or config.get("rope_theta") or 10000.0, "rope_theta"),
        "rotary-percent": (rotary_percent(config), "partial_rotary_factor"),
        "rotary-interleaved": (family.rotary_interleaved, "architectures"),
        "use-rope-scaling": (scaled, "rope_scaling"),
        "untie-embeddings-and-output-weights": (not tied, "tie_word_embeddings"),
        "attention-dropout": (0.0, "engines have no dropout"),
        "hidden-dropout": (0.0, "engines have no dropout"),
    }
    if scaled:
        shape["rope-scaling-factor"] = (float(rope["factor"]), "rope_scaling.factor")
    return shape | _experts(config)


def _experts(config: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    experts = config.get("num_experts") or config.get("num_local_experts")  # transformers 5 writes the latter
    if not experts:
        return {"num-experts": (None, "num_experts")}
    shared = config.get("shared_expert_intermediate_size")
    return {
        "num-experts": (experts, "num_experts"),
        "moe-ffn-hidden-size": (config.get("moe_intermediate_size"), "moe_intermediate_size"),
        "moe-router-topk": (config.get("num_experts_per_tok"), "num_experts_per_tok"),
        "moe-shared-expert-intermediate-size": (shared, "shared_expert_intermediate_size"),
        "moe-router-score-function": ("softmax", "architectures"),
        "moe-router-pre-softmax": (not config.get("norm_topk_prob", False), "norm_topk_prob"),
        "moe-layer-freq": (moe_layers(config), "decoder_sparse_step and mlp_only_layers"),
    }


def moe_layers(config: Mapping[str, Any]) -> list[int]:
    """1 for each layer with experts, 0 for a dense one."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = range(config["num_hidden_layers"])
    return [int(step > 0 and (i + 1) % step == 0 and i not in dense) for i in layers]


def layer_pattern(text: str, num_layers: int) -> list[int]:
    """`--moe-layer-freq`: every how many layers there are experts, or a list such as `([0]*1+[1]*47)`.

    Raises:
        UserError: it is neither.
    """
    compact = re.sub(r"[\s()'\"]", "", text)
    if re.fullmatch(r"\d+", compact) and int(compact):
        return [int(i % int(compact) == 0) for i in range(num_layers)]
    pattern: list[int] = []
    for term in compact.split("+"):
        match = re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d+))?", term)
        if match is None:
            raise UserError(
                f"--moe-layer-freq {text!r}: neither a number nor a list of 0 and 1 such as '([1]*48)'."
            )
        pattern += [int(each) for each in match[1].split(",")] * int(match[2] or 1)
    return pattern


def check_model_flags(
    args: argparse.Namespace, config: Mapping[str, Any], sources: Mapping[str, str] | None = None
) -> None:
    """See that the shape flags that were given agree with `config.json`.

    Args:
        args: With the flags' values, None where left out.
        config: The parsed `config.json` of `args.hf_checkpoint`.
        sources: Where each flag comes from (flag without dashes → text), for the message.

    Raises:
        UserError: shows both values and where each comes from.
    """
    for flag, (expected, key) in megatron_shape(config).items():
        value = getattr(args, flag.replace("-", "_"), None)
        if value is None:
            continue
        if flag == "moe-layer-freq" and expected is not None:
            value = layer_pattern(value, config["num_hidden_layers"])
        if value != expected:
            raise UserError(_contradiction(args, flag, expected, key, (sources or {}).get(flag, "flag")))


def _contradiction(args: argparse.Namespace, flag: str, expected: Any, key: str, source: str) -> str:
    value = getattr(args, flag.replace("-", "_"))
    given = f"--{flag}" if value is True else f"--{flag} {value}"
    if flag.endswith("dropout"):
        return f"{given} ({source}): {key}, so the trainer's must be 0 too."
    return (
        f"{given} ({source}) contradicts {args.hf_checkpoint}/config.json, whose {key} makes it {expected}:"
        " the weights would not fit. Leave the flag out and the shape comes from config.json, or give the"
        " model that it is meant for."
    )
