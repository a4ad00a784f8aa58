"""How Megatron-core's parameters correspond to Hugging Face's: names, and how their rows are laid out.

One parameter of Megatron-core holds one or several tensors of Hugging Face (query, key and value; gate and
up). Tensor parallelism splits each of these along one dimension, so converting is the same for every rank:
take the rank's slice of each tensor, then merge the slices. Tensors are torch's; no process group is needed.
Layers and experts count over the whole model here, whichever pipeline stage or rank holds them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rltrain.arguments.hf_config import Family, ModelShape

Layout = Literal["plain", "qkv", "stacked", "halves", "vocab"]


@dataclass(frozen=True)
class Parameter:
    """Where one Megatron-core parameter comes from.

    Attributes:
        hf_names: The Hugging Face tensors that it holds.
        layout: `plain`: one tensor. `qkv`: query, key and value rows interleaved by key-value group.
            `stacked`: tensors below one another. `halves`: the same, but Hugging Face has them as one tensor,
            of which a rank holds a share of each half. `vocab`: one tensor, padded with rows of zeros.
        split_dim: The dimension that tensor parallelism splits in the Hugging Face tensors; None: replicated.
        is_expert: Held by the ranks of its expert alone, and split by expert tensor parallelism.
    """

    hf_names: tuple[str, ...]
    layout: Layout
    split_dim: int | None
    is_expert: bool = False


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_TOP = {
    "embedding.word_embeddings.weight": Parameter(("model.embed_tokens.weight",), "vocab", 0),
    "output_layer.weight": Parameter(("lm_head.weight",), "vocab", 0),
    "decoder.final_layernorm.weight": Parameter(("model.norm.weight",), "plain", None),
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_IN_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": Parameter(("input_layernorm.weight",), "plain", None),
    "self_attention.linear_qkv.weight": Parameter(tuple(f"{name}.weight" for name in _QKV), "qkv", 0),
    "self_attention.linear_qkv.bias": Parameter(tuple(f"{name}.bias" for name in _QKV), "qkv", 0),
    "self_attention.q_layernorm.weight": Parameter(("self_attn.q_norm.weight",), "plain", None),
    "self_attention.k_layernorm.weight": Parameter(("self_attn.k_norm.weight",), "plain", None),
    "self_attention.linear_proj.weight": Parameter(("self_attn.o_proj.weight",), "plain", 1),
    "mlp.linear_fc1.layer_norm_weight": Parameter(("post_attention_layernorm.weight",), "plain", None),
    "mlp.linear_fc1.weight": Parameter(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "stacked", 0),
    "mlp.linear_fc2.weight": Parameter(("mlp.down_proj.weight",), "plain", 1),
    "pre_mlp_layernorm.weight": Parameter(("post_attention_layernorm.weight",), "plain", None),
    "mlp.router.weight": Parameter(("mlp.gate.weight",), "plain", None),
    "post_self_attn_layernorm.weight": Parameter(("post_self_attn_layernorm.weight",), "plain", None),
    "post_mlp_layernorm.weight": Parameter(("post_mlp_layernorm.weight",), "plain", None),
}
_FUSED_GATE_UP = {"mlp.linear_fc1.weight": Parameter(("mlp.gate_up_proj.weight",), "halves", 0)}
_EXPERT = re.compile(r"mlp\.experts\.linear_fc([12])\.weight(\d+)")
_IN_EXPERT = {
    "1": Parameter(("gate_proj.weight", "up_proj.weight"), "stacked", 0, is_expert=True),
    "2": Parameter(("down_proj.weight",), "plain", 1, is_expert=True),
}


def parameter(name: str, family: Family) -> Parameter:
    """The entry of a Megatron-core parameter, by its name in an unsplit model.

    Raises:
        KeyError: no supported model has such a parameter.
    """
    if name in _TOP:
        return _TOP[name]
    match = _LAYER.fullmatch(name)
    if match is None:
        raise KeyError(f"no Hugging Face tensor is known for {name}")
    prefix = f"model.layers.{match[1]}."
    if expert := _EXPERT.fullmatch(match[2]):
        entry = _IN_EXPERT[expert[1]]
        prefix += f"mlp.experts.{expert[2]}."
    elif family.fused_gate_up and match[2] in _FUSED_GATE_UP:
        entry = _FUSED_GATE_UP[match[2]]
    elif match[2] in _IN_LAYER:
        entry = _IN_LAYER[match[2]]
    else:
        raise KeyError(f"no Hugging Face tensor is known for {name}")
    return replace(entry, hf_names=tuple(prefix + hf_name for hf_name in entry.hf_names))


def global_name(name: str, first_layer: int, first_expert: int) -> str:
    """A parameter's name in the whole model, from its name in one rank's part of it.

    Args:
        first_layer: How many layers of the model come before this part's.
        first_expert: How many experts of each layer come before this rank's.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    rest = match[2]
    if expert := _EXPERT.fullmatch(rest):
        rest = f"mlp.experts.linear_fc{expert[1]}.weight{int(expert[2]) + first_expert}"
    return f"decoder.layers.{int(match[1]) + first_layer}.{rest}"


def merge(parts: list[Tensor], layout: Layout, groups: int) -> Tensor:
    """One rank's Megatron-core parameter from its slices of the Hugging Face tensors.

    Args:
        parts: One slice for each of `Parameter.hf_names`.
        groups: Key-value groups of this rank.
    """
    if layout != "qkv":
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    by_group = [part.unflatten(0, (groups, -1)) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def split(weight: Tensor, layout: Layout, shape: ModelShape, groups: int) -> list[Tensor]:
    """The inverse of `merge`."""
    match layout:
        case "qkv":
            queries = shape.num_heads // shape.num_kv_heads * shape.head_dim
            sizes = [queries, shape.head_dim, shape.head_dim]
            by_group = weight.unflatten(0, (groups, -1)).split(sizes, dim=1)
            return [part.flatten(0, 1) for part in by_group]
        case "stacked":
            return list(weight.chunk(2))
        case _:
            return [weight]


def join(shards: list[Tensor], layout: Layout, dim: int) -> Tensor:
    """A whole Hugging Face tensor from the ranks' shares of it."""
    if len(shards) == 1:
        return shards[0]
    if layout == "halves":
        halves = [shard.chunk(2, dim) for shard in shards]
        shards = [rank[half] for half in (0, 1) for rank in halves]
    return torch.cat(shards, dim)
