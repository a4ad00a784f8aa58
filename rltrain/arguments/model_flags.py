"""Megatron's flags of a model's shape, as slime's model scripts give them.

They may be left out: the shape comes from the Hugging Face `config.json`. Those that are given must agree with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rltrain.arguments.config import Config
from rltrain.arguments.groups.model import Shape
from rltrain.arguments.groups.training import Lora, Mtp
from rltrain.arguments.hf_config import ModelShape, read_model_shape
from rltrain.models.families import FAMILIES
from rltrain.models.quantised import fp8_block
from rltrain.run.errors import UserError

# Whose quantised weights SGLang can load anew, with its load format flash_rl.
_FLASH_RL = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")


def megatron_shape(config: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """The values of Megatron's shape flags that follow from a `config.json`.

    Returns:
        Flag without dashes → its value, and where in `config.json` it comes from. A switch that is off is False.
    """
    found = read_model_shape(config)
    family, rope = found.family, found.rope
    shape: dict[str, tuple[Any, str]] = {
        "num-layers": (found.num_layers, "num_hidden_layers"),
        "hidden-size": (found.hidden_size, "hidden_size"),
        "ffn-hidden-size": (found.ffn_hidden_size, "intermediate_size"),
        "num-attention-heads": (found.num_heads, "num_attention_heads"),
        "group-query-attention": (found.num_kv_heads != found.num_heads, "num_key_value_heads"),
        "num-query-groups": (found.num_kv_heads, "num_key_value_heads"),
        "kv-channels": (found.head_dim, "head_dim"),
        "vocab-size": (found.vocab_size, "vocab_size"),
        "normalization": ("RMSNorm", "architectures"),
        "norm-epsilon": (found.norm_eps, "rms_norm_eps"),
        "swiglu": (not family.gelu and not (found.experts and found.experts.limit), "hidden_act"),
        "disable-bias-linear": (not family.biases, "mlp_bias"),
        "add-qkv-bias": (
            found.qkv_bias,
            family.qkv_bias if isinstance(family.qkv_bias, str) else "architectures",
        ),
        "qk-layernorm": (
            found.qk_norm,
            family.qk_norm if isinstance(family.qk_norm, str) else "architectures",
        ),
        "apply-layernorm-1p": (family.zero_centered_norms, "architectures"),
        "attention-output-gate": (family.output_gate, "architectures"),
        "post-self-attn-layernorm": (family.post_norms, "architectures"),
        "post-mlp-layernorm": (family.post_norms, "architectures"),
        "position-embedding-type": ("rope", "architectures"),
        "use-rotary-position-embeddings": (True, "architectures"),
        "rotary-base": (rope.theta, "rope_theta"),
        "rotary-percent": (rope.percent, "partial_rotary_factor"),
        "rotary-interleaved": (family.rotary_interleaved, "architectures"),
        "use-rope-scaling": (rope.kind == "llama3", "rope_scaling"),
        "untie-embeddings-and-output-weights": (not found.tied_embeddings, "tie_word_embeddings"),
        "attention-dropout": (0.0, "engines have no dropout"),
        "hidden-dropout": (0.0, "engines have no dropout"),
    }
    if rope.kind == "llama3":
        shape["rope-scaling-factor"] = (rope.factor, "rope_scaling.factor")
    return _latent(found, shape) | _experts(found) | _linear(found)


def _latent(shape: ModelShape, usual: dict[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    latent, rope = shape.latent, shape.rope
    if latent is None:
        return usual | {"multi-latent-attention": (False, "architectures")}
    # Megatron does not read these with latent attention, and launch scripts have various values.
    unread = (
        "group-query-attention",
        "num-query-groups",
        "kv-channels",
        "rotary-interleaved",
        "add-qkv-bias",
    )
    shared = {flag: value for flag, value in usual.items() if flag not in unread}
    if rope.kind == "yarn":
        shared |= {
            "rope-type": ("yarn", "rope_scaling"),
            "mscale": (rope.mscale, "rope_scaling.mscale"),
            "mscale-all-dim": (rope.mscale_all_dim, "rope_scaling.mscale_all_dim"),
        }
    return shared | {
        "qk-layernorm": (True, "architectures"),
        "multi-latent-attention": (True, "architectures"),
        "q-lora-rank": (latent.query_rank, "q_lora_rank"),
        "kv-lora-rank": (latent.kv_rank, "kv_lora_rank"),
        "qk-head-dim": (latent.plain_size, "qk_nope_head_dim"),
        "qk-pos-emb-head-dim": (latent.rotated_size, "qk_rope_head_dim"),
        "v-head-dim": (latent.value_size, "v_head_dim"),
        "rotary-scaling-factor": (rope.factor, "rope_scaling.factor"),
    }


def _linear(shape: ModelShape) -> dict[str, tuple[Any, str]]:
    linear = shape.linear
    if linear is None:
        return {"linear-attention-freq": (None, "architectures")}
    layers = [int(i in linear.layers) for i in range(shape.num_layers)]
    return {
        "linear-attention-freq": (layers, "entries for layers with linear attention"),
        "linear-conv-kernel-dim": (linear.kernel, "linear_conv_kernel_dim"),
        "linear-key-head-dim": (linear.key_size, "linear_key_head_dim"),
        "linear-value-head-dim": (linear.value_size, "linear_value_head_dim"),
        "linear-num-key-heads": (linear.key_heads, "linear_num_key_heads"),
        "linear-num-value-heads": (linear.value_heads, "linear_num_value_heads"),
    }


def _experts(shape: ModelShape) -> dict[str, tuple[Any, str]]:
    experts = shape.experts
    if experts is None:
        return {"num-experts": (None, "num_experts")}
    # Without effect on sigmoid scores; launch scripts have it there.
    pre_softmax = {"moe-router-pre-softmax": (not experts.normalized, "norm_topk_prob")}
    return (pre_softmax if experts.score == "softmax" else {}) | {
        "num-experts": (experts.count, "num_experts"),
        "moe-ffn-hidden-size": (experts.ffn_hidden_size, "moe_intermediate_size"),
        "moe-router-topk": (experts.top_k, "num_experts_per_tok"),
        "moe-shared-expert-intermediate-size": (experts.shared_size or None, "shared experts"),
        "moe-shared-expert-gate": (experts.shared_gate, "architectures"),
        "moe-router-score-function": (experts.score, "architectures"),
        "moe-router-enable-expert-bias": (experts.correction_bias, "architectures"),
        "moe-router-num-groups": (experts.groups, "n_group"),
        "moe-router-group-topk": (experts.groups_taken, "topk_group"),
        "moe-router-topk-scaling-factor": (experts.scale, "routed_scaling_factor"),
        "moe-layer-freq": (moe_layers(shape), "entries for layers with and without experts"),
    }


def moe_layers(shape: ModelShape) -> list[int]:
    """1 for each layer with experts, 0 for a dense one."""
    return [int(shape.experts is not None and i in shape.experts.layers) for i in range(shape.num_layers)]


def layer_pattern(text: str, num_layers: int, flag: str = "moe-layer-freq") -> list[int]:
    """`--moe-layer-freq`: the interval between layers with experts, or a list such as `([0]*1+[1]*47)`.

    `--linear-attention-freq`: the interval between layers without linear attention, or such a list.

    Raises:
        UserError: it is neither.
    """
    compact = re.sub(r"[\s()'\"]", "", text)
    if re.fullmatch(r"\d+", compact) and int(compact):
        if flag == "linear-attention-freq":
            return [int((i + 1) % int(compact) != 0) for i in range(num_layers)]
        return [int(i % int(compact) == 0) for i in range(num_layers)]
    pattern: list[int] = []
    for term in compact.split("+"):
        match = re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d+))?", term)
        if match is None:
            raise UserError(f"--{flag} {text!r}: neither a number nor a list of 0 and 1 such as '([1]*48)'.")
        pattern += [int(each) for each in match[1].split(",")] * int(match[2] or 1)
    return pattern


def check_model_flags(
    given: Shape, config: Mapping[str, Any], hf_checkpoint: str, sources: Mapping[str, str] | None = None
) -> None:
    """Check that the given shape flags agree with `config.json`.

    Args:
        given: The flags' values, None where left out.
        config: The parsed `config.json` of `hf_checkpoint`.
        hf_checkpoint: For the message.
        sources: Where each flag comes from (flag without dashes → text), for the message.

    Raises:
        UserError: shows both values and where each comes from.
    """
    for flag, (expected, key) in megatron_shape(config).items():
        told = getattr(given, flag.replace("-", "_"), None)
        if told is None:
            continue
        value = told
        if flag in ("moe-layer-freq", "linear-attention-freq") and expected is not None:
            value = layer_pattern(told, config["num_hidden_layers"], flag)
        if value != expected:
            shown = f"--{flag}" if told is True else f"--{flag} {told}"
            shown += f" ({(sources or {}).get(flag, 'flag')})"
            raise UserError(_contradiction(flag, shown, expected, key, hf_checkpoint))


def _contradiction(flag: str, shown: str, expected: Any, key: str, hf_checkpoint: str) -> str:
    if flag.endswith("dropout"):
        return f"{shown}: {key}, so the trainer's must be 0 too."
    return (
        f"{shown} contradicts {hf_checkpoint}/config.json, whose {key} makes it {expected}:"
        " the weights would not fit. Leave the flag out to take the shape from config.json, or give the model that the"
        " flag is meant for."
    )


def check_quantised(hf_config: Mapping[str, Any], config: Config) -> None:
    """Refuse quantised engines that can't be given the trainer's weights, and a trainer without its own weights.

    Args:
        hf_config: The parsed `config.json` of --hf-checkpoint.
        config: Resolved.

    Raises:
        UserError: says what can be had instead.
    """
    if config.debug.debug_rollout_only:  # engines keep what they have
        return
    block = fp8_block(hf_config)
    if block is not None and not (config.checkpoint.load or config.checkpoint.ref_load):
        raise UserError(
            f"--hf-checkpoint {config.model.hf_checkpoint}: config.json sets quantization_config, and quantised"
            " weights can't be trained. Only engines can use them: give the model's bf16 weights with --ref-load."
        )
    _check_quantising_engines(hf_config, config, is_quantised=block is not None)


def check_lora(hf_config: Mapping[str, Any], lora: Lora) -> None:
    """Refuse adapters that the model can't have.

    Raises:
        UserError: names the flag and what there is.
    """
    shape = read_model_shape(hf_config)
    if not lora.lora_rank:
        return
    if shape.latent is not None or shape.linear is not None:
        kind = "latent" if shape.latent is not None else "linear"
        raise UserError(
            f"--lora-rank {lora.lora_rank}: {shape.architecture} has {kind} attention, which can't have adapters. Train"
            " all of it, without the flag."
        )
    there = lora_modules(shape)
    if missing := [name for name in lora.lora_target_modules or [] if name not in (*there, "all-linear")]:
        raise UserError(
            f"--lora-target-modules {missing[0]}: this {shape.architecture} has {', '.join(there)}"
            + (" (with experts, only attention can have adapters)." if shape.experts else ".")
        )


def check_mtp(hf_config: Mapping[str, Any], mtp: Mtp, hf_checkpoint: str) -> None:
    """Refuse --enable-mtp-training for a model without a layer for one token more, or with one that is not built here.

    Raises:
        UserError: lists the models for which it can be trained.
    """
    if not mtp.enable_mtp_training:
        return
    shape = read_model_shape(hf_config)
    if shape.family.head is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.head is not None)
        kept = (
            " This model's MTP layer stays as it is in --hf-checkpoint." if shape.family.extra_heads else ""
        )
        raise UserError(
            f"--enable-mtp-training: {shape.architecture} does not support it. Supported: {known}.{kept} Leave the flag"
            " out."
        )
    if (count := hf_config.get("num_nextn_predict_layers", 1)) != 1:
        raise UserError(
            f"--enable-mtp-training: {hf_checkpoint}/config.json has num_nextn_predict_layers {count}, and"
            " one such layer can be trained. Leave the flag out."
        )
    if shape.window is not None:
        raise UserError(
            "--enable-mtp-training: the model has layers with a sliding window, and config.json does not say which"
            " kind its MTP layer is. Leave the flag out."
        )


def lora_modules(shape: ModelShape) -> list[str]:
    """The linear layers of a model that can have adapters, as Hugging Face names them: of attention and of MLPs that
    are no experts, in models without any."""
    own = shape.family.tensors
    usual = {
        "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
        "self_attention.linear_proj": ("o_proj",),
        "mlp.linear_fc1": ("gate_proj", "up_proj"),
        "mlp.linear_fc2": ("down_proj",),
    }
    if shape.experts is not None:
        usual = {name: words for name, words in usual.items() if not name.startswith("mlp")}
    found: list[str] = []
    for name, words in usual.items():
        entry = own.get(f"{name}.weight")
        found += words if entry is None else [full.split(".")[-2] for full in entry.hf_names]
    return found


def _check_quantising_engines(hf_config: Mapping[str, Any], config: Config, *, is_quantised: bool) -> None:
    settings = config.engines.sglang
    method = settings.get("quantization")
    if config.debug.debug_train_only or method is None or (is_quantised and method == "fp8"):
        return
    architecture = (hf_config.get("architectures") or [""])[0]
    can_reload = settings.get("load_format") == "flash_rl" and not config.model.random_init
    if method == "fp8" and can_reload and architecture in _FLASH_RL:
        return
    raise UserError(
        f"--sglang-quantization {method}: SGLang repacks weights that it has quantised itself, and can't load the"
        " trainer's weights into them afterwards. It can with --sglang-quantization fp8 --sglang-load-format flash_rl,"
        " for"
        f" {' and '.join(_FLASH_RL)} and weights from a directory (this is {architecture}); or give --hf-checkpoint a"
        " directory in block FP8, and --ref-load the bf16 weights: docs/gpu.md."
    )
