"""Attention sinks: every head's softmax has one more score, a weight, whose share of the attention goes nowhere.

No kernel for attention has them. But a key that all queries see, with a value of zeros, is the same: queries get
further dimensions that hold their head's sink, the key has ones there, and all other keys have zeros. So sinks and
their gradients are exact, with every kernel that lets all queries see the first key.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_MORE = 8  # dimensions: kernels want multiples of 8


def new_sinks(config: TransformerConfig, groups: ProcessGroupCollection | None) -> torch.nn.Parameter:
    """A random sink for each head of this rank."""
    whole = torch.empty(config.num_attention_heads)
    assert config.init_method is not None
    config.init_method(whole)
    where = torch.device("cpu" if config.use_cpu_initialization else "cuda")
    rank = groups.tp.rank() if groups else 0
    own = whole.chunk(config.tensor_model_parallel_size)[rank]
    sinks = torch.nn.Parameter(own.clone().to(where, config.params_dtype))
    set_tensor_model_parallel_attributes(sinks, True, 0, 1)
    return sinks


def widen(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same attention with more dimensions; the extra query dimensions hold the sinks.

    Args:
        query, key, value: [tokens, heads, head_dim].
        sinks: One for each head.
        scale: Products of queries with keys will be multiplied by it.
    """
    exact = sinks.float() / scale
    first = exact.to(query.dtype)
    rest = (exact - first.float()).to(query.dtype)  # what 16 bits can't hold
    own = torch.nn.functional.pad(torch.stack([first, rest], dim=-1), (0, _MORE - 2))
    query = torch.cat([query, own.expand(len(query), -1, -1)], dim=-1)
    return query, torch.nn.functional.pad(key, (0, _MORE)), torch.nn.functional.pad(value, (0, _MORE))


def narrow(output: Tensor, heads: int) -> Tensor:
    """[tokens, heads × head_dim] from the attention of `widen`."""
    return output.unflatten(-1, (heads, -1))[..., :-_MORE].flatten(1)


def sink_key(key: Tensor) -> Tensor:
    """The key of all sinks, as wide as the last dimension of `key`."""
    sink = key.new_zeros(key.shape[-1])
    sink[-_MORE : 2 - _MORE] = 1
    return sink


def put_first(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """[sequences, heads, tokens, head_dim] with the sinks' key before all others."""
    shape = (*key.shape[:2], 1, key.shape[3])
    return torch.cat([sink_key(key).expand(shape), key], 2), torch.cat([value.new_zeros(shape), value], 2)


def put_first_of_each(key: Tensor, value: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed keys and values, [tokens, heads, head_dim], with the sinks' key first in each sequence.

    Args:
        offsets: Where each sequence begins and the last one ends, [sequences + 1]. They are not read back.

    Returns:
        Keys, values and the offsets of both.
    """
    index = torch.arange(len(key), device=key.device)
    places = index + torch.searchsorted(offsets[1:].contiguous(), index, right=True) + 1
    shape = (len(key) + len(offsets) - 1, *key.shape[1:])
    keys = sink_key(key).expand(shape).index_copy(0, places, key)
    values = value.new_zeros(shape).index_copy(0, places, value)
    return keys, values, offsets + torch.arange(len(offsets), device=key.device, dtype=offsets.dtype)
