"""How Megatron-core's parameters correspond to Hugging Face's: names, and how their rows are laid out.

One parameter of Megatron-core holds one or several tensors of Hugging Face (query, key and value; gate and
up). Tensor parallelism splits each of these along one dimension, so converting is the same for every rank:
take the rank's slice of each tensor, then merge the slices. Tensors are torch's; no process group is needed.
Layers and experts count over the whole model here, whichever pipeline stage or rank holds them.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from rltrain.arguments.hf_config import ModelShape
from rltrain.models.families.family import Family
from rltrain.models.tensors import Layout, Parameter

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
HEAD = "mtp_head."  # before the names of the layer that predicts one token more
_IN_HEAD = f"{HEAD}layer."
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
    "input_layernorm.weight": Parameter(("input_layernorm.weight",)),
    "self_attention.linear_q_proj.weight": Parameter(("self_attn.q_proj.weight",), "plain", 0),
    "self_attention.linear_q_down_proj.weight": Parameter(("self_attn.q_a_proj.weight",)),
    "self_attention.linear_q_up_proj.layer_norm_weight": Parameter(("self_attn.q_a_layernorm.weight",)),
    "self_attention.linear_q_up_proj.weight": Parameter(("self_attn.q_b_proj.weight",), "plain", 0),
    "self_attention.linear_kv_down_proj.weight": Parameter(("self_attn.kv_a_proj_with_mqa.weight",)),
    "self_attention.linear_kv_up_proj.layer_norm_weight": Parameter(("self_attn.kv_a_layernorm.weight",)),
    "self_attention.linear_kv_up_proj.weight": Parameter(("self_attn.kv_b_proj.weight",), "plain", 0),
    "self_attention.q_layernorm.weight": Parameter(("self_attn.q_norm.weight",), "plain", None),
    "self_attention.k_layernorm.weight": Parameter(("self_attn.k_norm.weight",), "plain", None),
    "self_attention.linear_proj.weight": Parameter(("self_attn.o_proj.weight",), "plain", 1),
    "self_attention.in_proj.layer_norm_weight": Parameter(("input_layernorm.weight",)),
    "self_attention.convolution": Parameter(("linear_attn.conv1d.weight",), "delta_convolution", 0),
    "self_attention.A_log": Parameter(("linear_attn.A_log",), "plain", 0),
    "self_attention.dt_bias": Parameter(("linear_attn.dt_bias",), "plain", 0),
    "self_attention.out_norm": Parameter(("linear_attn.norm.weight",)),
    "self_attention.out_proj.weight": Parameter(("linear_attn.out_proj.weight",), "plain", 1),
    "mlp.linear_fc1.layer_norm_weight": Parameter(("post_attention_layernorm.weight",), "plain", None),
    "mlp.linear_fc1.weight": Parameter(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "stacked", 0),
    "mlp.linear_fc2.weight": Parameter(("mlp.down_proj.weight",), "plain", 1),
    "pre_mlp_layernorm.weight": Parameter(("post_attention_layernorm.weight",), "plain", None),
    "mlp.router.weight": Parameter(("mlp.gate.weight",), "plain", None),
    "mlp.router.expert_bias": Parameter(("mlp.gate.e_score_correction_bias",)),
    "mlp.shared_experts.linear_fc1.weight": Parameter(
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"), "stacked", 0
    ),
    "mlp.shared_experts.linear_fc2.weight": Parameter(("mlp.shared_experts.down_proj.weight",), "plain", 1),
    "post_self_attn_layernorm.weight": Parameter(("post_self_attn_layernorm.weight",), "plain", None),
    "post_mlp_layernorm.weight": Parameter(("post_mlp_layernorm.weight",), "plain", None),
}
_EXPERT = re.compile(r"mlp\.experts\.linear_fc([12]\.(?:weight|bias))(\d+)")
_EXPERTS = "mlp.experts.{}."
_IN_EXPERT = {
    "mlp.experts.linear_fc1.weight": Parameter(
        (f"{_EXPERTS}gate_proj.weight", f"{_EXPERTS}up_proj.weight"), "stacked", 0, is_expert=True
    ),
    "mlp.experts.linear_fc2.weight": Parameter((f"{_EXPERTS}down_proj.weight",), "plain", 1, is_expert=True),
}


def parameter(name: str, shape: ModelShape) -> Parameter:
    """The entry of a Megatron-core parameter, by its name in an unsplit model.

    Raises:
        KeyError: no supported model has such a parameter.
    """
    if name in _TOP:
        return _TOP[name]
    head = shape.head
    if head is not None and name.startswith(HEAD) and not name.startswith(_IN_HEAD):
        field = name.removeprefix(HEAD).removesuffix(".weight")
        return Parameter((getattr(head, field).format(shape.num_layers),))
    if head is not None and name.startswith(_IN_HEAD):
        return _in_layer(name.removeprefix(_IN_HEAD), head.layer.format(shape.num_layers), shape.family)
    if match := _LAYER.fullmatch(name):
        return _in_layer(match[2], f"model.layers.{match[1]}.", shape.family)
    raise KeyError(f"no Hugging Face tensor is known for {name}")


def _in_layer(name: str, prefix: str, family: Family) -> Parameter:
    if expert := _EXPERT.fullmatch(name):
        kind = f"mlp.experts.linear_fc{expert[1]}"
        entry = family.tensors.get(kind) or _IN_EXPERT[kind]
        names = tuple(prefix + hf_name.format(expert[2]) for hf_name in entry.hf_names)
        return replace(entry, hf_names=names, expert=int(expert[2]))
    if name in family.tensors:
        entry = family.tensors[name]
    elif name in _IN_LAYER:
        entry = _IN_LAYER[name]
    else:
        raise KeyError(f"no Hugging Face tensor is known for a layer's {name}")
    return replace(entry, hf_names=tuple(prefix + hf_name for hf_name in entry.hf_names))


def global_name(name: str, first_layer: int, first_expert: int) -> str:
    """A parameter's name in the whole model, from its name in one rank's part of it.

    Args:
        first_layer: How many layers of the model come before this part's.
        first_expert: How many experts of each layer come before this rank's.
    """
    if expert := _EXPERT.search(name):
        name = f"{name[: expert.start()]}mlp.experts.linear_fc{expert[1]}{int(expert[2]) + first_expert}"
    if match := _LAYER.fullmatch(name):
        return f"decoder.layers.{int(match[1]) + first_layer}.{match[2]}"
    return name


def hf_shapes(
    entry: Parameter, local: tuple[int, ...], size: int, shape: ModelShape
) -> list[tuple[int, ...]]:
    """The shapes of a parameter's whole Hugging Face tensors.

    Args:
        local: The shape of one rank's part of the parameter.
        size: How many ranks it is split over.
    """
    if entry.of_all_experts:
        assert shape.experts is not None
        return [(shape.experts.count, *(local if entry.layout == "plain" else reversed(local)))]
    if entry.split_dim is None:
        return [local]
    dim = entry.split_dim
    whole = (*local[:dim], local[dim] * size, *local[dim + 1 :])
    match entry.layout:
        case "vocab":
            return [(shape.vocab_size, *whole[1:])]
        case "qkv" | "gated_qkv" | "delta" | "delta_by_head":
            groups, rows = _grouped(entry.layout, shape)
            return [(groups * sum(each), *whole[1:]) for each in rows]
        case "stacked":
            return [(whole[0] // 2, *whole[1:])] * 2
        case _:
            return [whole]


def _grouped(layout: Layout, shape: ModelShape) -> tuple[int, list[tuple[int, ...]]]:
    """How many groups of rows a parameter has, and how many rows of each tensor, and of each of its parts, one has."""
    if not layout.startswith("delta"):
        queries = shape.num_heads // shape.num_kv_heads * shape.head_dim
        if layout == "fused_qkv":
            return shape.num_kv_heads, [(queries, shape.head_dim, shape.head_dim)]
        gated = 2 if layout == "gated_qkv" else 1
        return shape.num_kv_heads, [(gated * queries,), (shape.head_dim,), (shape.head_dim,)]
    assert shape.linear is not None
    sizes = shape.linear.group
    of_layout: dict[str, list[tuple[int, ...]]] = {
        "delta": [sizes[:3], *((size,) for size in sizes[3:])],
        "delta_by_head": [(sum(sizes[:4]),), (sum(sizes[4:]),)],
        "delta_convolution": [sizes[:3]],
    }
    return shape.linear.key_heads, of_layout[layout]


_IN_GROUPS = ("qkv", "fused_qkv", "gated_qkv", "delta", "delta_by_head", "delta_convolution")


def merge(parts: list[Tensor], layout: Layout, shape: ModelShape, size: int) -> Tensor:
    """One rank's Megatron-core parameter from its slices of the Hugging Face tensors.

    Args:
        parts: One slice for each of `Parameter.hf_names`.
        size: How many ranks it is split over.
    """
    if layout in ("woven", "transposed"):
        rows = parts[0].t()  # what has one dimension stays as it is
        return torch.cat([rows[::2], rows[1::2]]) if layout == "woven" else rows
    if layout not in _IN_GROUPS:
        return _below(parts)
    groups, rows_of = _grouped(layout, shape)
    groups //= size
    if layout == "gated_qkv":
        by_head = parts[0].unflatten(0, (groups, -1, 2, shape.head_dim))
        parts = [by_head.transpose(1, 2).flatten(0, 3), *parts[1:]]
    pieces = [
        piece.unflatten(0, (groups, -1))
        for part, sizes in zip(parts, rows_of, strict=True)
        for piece in part.split([groups * each for each in sizes])
    ]
    return torch.cat(pieces, dim=1).flatten(0, 1)


def split(weight: Tensor, layout: Layout, shape: ModelShape, size: int) -> list[Tensor]:
    """The inverse of `merge`."""
    match layout:
        case "stacked":
            return list(weight.chunk(2))
        case "woven":
            return [torch.stack(weight.chunk(2), dim=1).flatten(0, 1).t()]
        case "transposed":
            return [weight.t()]
        case _ if layout not in _IN_GROUPS:
            return [weight]
    groups, rows_of = _grouped(layout, shape)
    groups //= size
    pieces = iter(
        weight.unflatten(0, (groups, -1)).split([each for sizes in rows_of for each in sizes], dim=1)
    )
    parts = [_below([next(pieces).flatten(0, 1) for _ in sizes]) for sizes in rows_of]
    if layout == "gated_qkv":
        by_kind = parts[0].unflatten(0, (groups, 2, -1, shape.head_dim))
        parts[0] = by_kind.transpose(1, 2).flatten(0, 3)
    return parts


def _below(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def blocks(layout: Layout, length: int, shape: ModelShape, number: int = 0) -> list[int]:
    """How many rows the parts of a tensor, or of a rank's share of it, have: a rank holds a share of each.

    Args:
        number: Which of the parameter's tensors.
    """
    if layout == "halves":
        return [length // 2] * 2
    if layout not in _IN_GROUPS:
        return [length]
    sizes = _grouped(layout, shape)[1][number]
    return [length // sum(sizes) * each for each in sizes]


def join(shards: list[Tensor], layout: Layout, dim: int, shape: ModelShape, number: int = 0) -> Tensor:
    """A whole Hugging Face tensor, the parameter's of this number, from the ranks' shares of it."""
    if len(shards) == 1:
        return shards[0]
    parts = [shard.split(blocks(layout, shard.shape[dim], shape, number), dim) for shard in shards]
    return torch.cat([part for same in zip(*parts, strict=True) for part in same], dim)
