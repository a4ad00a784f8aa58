"""Rotary embeddings that Megatron-core lacks: all kinds of scaling, and two bases in one model."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from rltrain.arguments.hf_config import ModelShape
from rltrain.models.rope import Rope


def set_frequencies(model: GPTModel, shape: ModelShape) -> None:
    """Give a model on this pipeline stage the frequencies of its `config.json`.

    Megatron-core has not all kinds of scaling, and fixes most of Llama 3's constants. Where layers with a window have
    another base, the model computes the angles of both, and each layer takes its own. Where part of a head is rotated,
    the factor of rotated queries and keys can't go into the scores' scale.
    """
    frequencies = [inverse_frequencies(shape.rope, shape.head_dim)]
    if shape.local_theta is not None:
        local = replace(shape.rope, theta=shape.local_theta)
        frequencies.append(inverse_frequencies(local, shape.head_dim))
        windowed = shape.window.layers if shape.window else ()
        for layer in model.decoder.layers:
            own = partial(_own_angles, int(layer.layer_number - 1 in windowed))
            layer.self_attention.register_forward_pre_hook(own, with_kwargs=True)
    if shape.rope.percent != 1 and shape.rope.attention_factor != 1:
        rotated = int(shape.head_dim * shape.rope.percent)
        for layer in model.decoder.layers:
            grown = partial(_grown_queries, rotated, shape.rope.attention_factor**2)
            layer.self_attention.core_attention.register_forward_pre_hook(grown)
    model.rotary_pos_emb.inv_freq = torch.cat(frequencies).to(model.rotary_pos_emb.inv_freq.device)


def _grown_queries(
    rotated: int, factor: float, module: torch.nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Queries, [..., head_dim], of which the rotated dimensions count `factor` times: for the keys' too."""
    query = args[0]
    return torch.cat([query[..., :rotated] * factor, query[..., rotated:]], dim=-1), *args[1:]


def _own_angles(
    which: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of the angles of both bases, [tokens, 1, 1, 2 × head_dim], those of one; a layer's head has them twice."""
    both = kwargs["rotary_pos_emb"].unflatten(-1, (2, 2, -1))
    return args, {**kwargs, "rotary_pos_emb": both[..., which, :].flatten(-2)}


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians a position of each pair of rotated dimensions, [rotated / 2], computed as transformers does."""
    size = int(head_dim * rope.percent)
    plain = 1.0 / (rope.theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    if rope.kind == "longrope":
        return plain / torch.tensor(rope.slower)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_positions * plain / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        share = ((turns - low) / (high - low)).clamp(0, 1)
    elif rope.kind == "yarn":
        share = 1 - _yarn_ramp(rope, size)
    else:
        return plain
    return plain / rope.factor * (1 - share) + plain * share


def _yarn_ramp(rope: Rope, size: int) -> torch.Tensor:
    """Share of interpolation in each frequency: none in the high ones, all in the low ones."""
    low, high = (
        size * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0.0
    return ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
