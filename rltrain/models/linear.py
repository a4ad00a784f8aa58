"""Linear attention as a `config.json` describes it: gated delta nets, https://arxiv.org/abs/2412.06464."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rltrain.models.entries import whole_number
from rltrain.run.errors import UserError

CHUNK = 64  # tokens that are computed together; the result is the same for every number


@dataclass(frozen=True)
class LinearAttention:
    """Layers that keep a matrix a head of what they have seen, in place of all keys and values.

    Attributes:
        layers: Those that do, from 0.
        key_heads: Heads of queries and of keys.
        value_heads: Heads of values, a multiple of `key_heads`.
        key_size: Dimensions of a head's query and key.
        value_size: Of a head's value.
        kernel: Tokens that the convolution over queries, keys and values sees.
    """

    layers: tuple[int, ...]
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int

    @property
    def group(self) -> tuple[int, int, int, int, int, int]:
        """Outputs of the first projection for a key head: query, key, values, their gates, and two numbers a value."""
        ratio = self.value_heads // self.key_heads
        values = ratio * self.value_size
        return self.key_size, self.key_size, values, values, ratio, ratio

    def weights(self, hidden: int) -> int:
        """How many numbers its projections and convolution have, and its heads of values, each two."""
        convolved = self.key_heads * sum(self.group[:3])
        values = self.value_heads * self.value_size
        return (
            hidden * (self.key_heads * sum(self.group) + values)
            + convolved * self.kernel
            + 2 * self.value_heads
        )

    def products(self) -> int:
        """Multiplications for a token beside those with weights: within its chunk, and with the heads' matrices."""
        key, value = self.key_size, self.value_size
        return self.value_heads * (CHUNK * (2 * key + value) + CHUNK * (key + value) // 2 + 3 * key * value)


def read_linear(config: Mapping[str, Any]) -> LinearAttention:
    """The linear attention of a `config.json` whose defaults have been filled in.

    Raises:
        UserError: an entry is missing or impossible, or two that disagree.
    """
    keys, values = (
        whole_number(config, "linear_num_key_heads"),
        whole_number(config, "linear_num_value_heads"),
    )
    if values % keys:
        raise UserError(
            f"the model's config.json has linear_num_value_heads {values} and linear_num_key_heads {keys}: the second"
            " must divide the first."
        )
    return LinearAttention(
        layers=_layers(config),
        key_heads=keys,
        value_heads=values,
        key_size=whole_number(config, "linear_key_head_dim"),
        value_size=whole_number(config, "linear_value_head_dim"),
        kernel=whole_number(config, "linear_conv_kernel_dim"),
    )


def _layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Those that `layer_types` names; without it all but every fourth, or as `full_attention_interval` says."""
    count, kinds = config["num_hidden_layers"], config.get("layer_types")
    by_interval: tuple[int, ...] | None = None
    if "full_attention_interval" in config or kinds is None:
        interval = whole_number({"full_attention_interval": 4, **config}, "full_attention_interval")
        by_interval = tuple(i for i in range(count) if (i + 1) % interval)
    if kinds is None:
        assert by_interval is not None
        return by_interval
    known = {"linear_attention", "full_attention"}
    if not isinstance(kinds, list) or len(kinds) != count or {str(each) for each in kinds} - known:
        raise UserError(
            f"the model's config.json has layer_types {kinds}: it must have linear_attention or full_attention for each"
            f" of {count} layers."
        )
    listed = tuple(i for i, kind in enumerate(kinds) if kind == "linear_attention")
    if by_interval is not None and by_interval != listed:  # transformers reads the one and SGLang the other
        raise UserError(
            f"the model's config.json has full_attention_interval {config['full_attention_interval']}, but layer_types"
            f" gives linear attention to the layers {list(listed)}. Remove one of the two."
        )
    return listed


def check_engines(linear: LinearAttention | None, config: Mapping[str, Any], hf_checkpoint: str) -> None:
    """Refuse a `config.json` that lacks what SGLang reads, without which no engine starts.

    Args:
        config: As it is in the file.
        hf_checkpoint: For the message.

    Raises:
        UserError: says what to write into it.
    """
    if linear is None or "full_attention_interval" in config:
        return
    count = config["num_hidden_layers"]
    full = sorted(set(range(count)) - set(linear.layers))
    interval = full[0] + 1 if full else count + 1
    if full != [i for i in range(count) if not (i + 1) % interval]:
        raise UserError(
            f"{hf_checkpoint}/config.json has layers with linear attention at no interval ({list(linear.layers)}),"
            " which SGLang does not support. The trainer alone does (--debug-train-only)."
        )
    raise UserError(
        f"{hf_checkpoint}/config.json lacks full_attention_interval, from which SGLang reads the layers with linear"
        f' attention; transformers leaves it out. Add "full_attention_interval": {interval}.'
    )


DEFAULTS = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
