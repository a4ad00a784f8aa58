"""Multi-head latent attention as a `config.json` describes it: DeepSeek-V2, https://arxiv.org/abs/2405.04434."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rltrain.models.entries import whole_number
from rltrain.models.lengths import Limit
from rltrain.run.errors import UserError

# transformers does not take rms_norm_eps for the norms of the compressed queries, keys and values.
NORM_EPS = 1e-6


@dataclass(frozen=True)
class LatentAttention:
    """Keys and values (and queries) are projected down, normalised, and projected up.

    Attributes:
        query_rank: Width of the compressed queries; None: they are not compressed.
        kv_rank: Of the compressed keys and values together.
        plain_size: Dimensions of a head's query and key that are not rotated.
        rotated_size: Those that are; the keys' are shared by all heads.
        value_size: Of a head's value.
        chosen: Tokens that a token sees: an indexer chooses them where there are more before it. None: it sees all.
    """

    query_rank: int | None
    kv_rank: int
    plain_size: int
    rotated_size: int
    value_size: int
    chosen: int | None = None

    @property
    def limit(self) -> Limit | None:
        """How long sequences may be."""
        if self.chosen is None:
            return None
        return Limit(
            self.chosen,
            f"in sequences of more than {self.chosen} tokens (index_topk) an indexer chooses the visible tokens",
        )

    def weights(self, hidden: int, heads: int) -> tuple[int, int]:
        """How many numbers its projections have: of those that tensor parallelism splits, and of the others."""
        size = self.plain_size + self.rotated_size
        whole = hidden * (self.kv_rank + self.rotated_size + (self.query_rank or 0))
        keys_values = self.kv_rank * (self.plain_size + self.value_size)
        return heads * ((self.query_rank or hidden) * size + keys_values + self.value_size * hidden), whole


def read_latent(config: Mapping[str, Any]) -> LatentAttention:
    """The attention of a `config.json` whose defaults have been filled in.

    Raises:
        UserError: an entry is missing or impossible.
    """
    rotated = whole_number(config, "qk_rope_head_dim")
    if config["head_dim"] not in (_UNSAID, rotated):
        raise UserError(
            f"the model's config.json has head_dim {config['head_dim']} and qk_rope_head_dim {rotated}: leave head_dim"
            " out."
        )
    heads, kv_heads = whole_number(config, "num_attention_heads"), config["num_key_value_heads"]
    if kv_heads not in (None, heads) or rotated % 2:
        raise UserError(
            f"the model's config.json has {heads} attention heads, num_key_value_heads {kv_heads} and qk_rope_head_dim"
            f" {rotated}: latent attention needs equal numbers of heads, and an even size."
        )
    plain, value = whole_number(config, "qk_nope_head_dim"), whole_number(config, "v_head_dim")
    if value > plain + rotated:  # Megatron-core 0.19 pads values to the size of queries, or cuts them
        raise UserError(
            f"the model's config.json has v_head_dim {value}, more than qk_nope_head_dim {plain} and qk_rope_head_dim"
            f" {rotated} together: Megatron-core has no attention for these sizes."
        )
    rank = config["q_lora_rank"]
    return LatentAttention(
        query_rank=None if rank is None else whole_number(config, "q_lora_rank"),
        kv_rank=whole_number(config, "kv_lora_rank"),
        plain_size=plain,
        rotated_size=rotated,
        value_size=value,
    )


def read_indexed_latent(config: Mapping[str, Any]) -> LatentAttention:
    """The same with DeepSeek's sparse attention, https://arxiv.org/abs/2512.02556: an indexer chooses what is seen.

    Up to `index_topk` tokens it chooses all, whatever its weights are: only these sequences can be trained.
    """
    latent = read_latent({**config, **DEFAULTS})  # nobody reads head_dim here
    if latent.query_rank is None:
        raise UserError("the model's config.json has no q_lora_rank, which its indexer needs.")
    whole_number(config, "num_key_value_heads")  # null is an error to transformers here
    for name in ("index_n_heads", "index_head_dim"):
        whole_number(config, name)
    if config["index_head_dim"] < latent.rotated_size:
        raise UserError(
            f"the model's config.json has index_head_dim {config['index_head_dim']}, less than qk_rope_head_dim"
            f" {latent.rotated_size}: its indexer can't rotate so many."
        )
    layers, kinds = config["num_hidden_layers"], config.get("indexer_types")
    if kinds is not None and (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or kinds[0] != "full"
        or any(each not in ("full", "shared") for each in kinds)
    ):
        raise UserError(
            f"the model's config.json has indexer_types {kinds}: it must have full or shared for each of {layers}"
            " layers, and full for the first."
        )
    return replace(latent, chosen=whole_number(config, "index_topk"))


_UNSAID = "as qk_rope_head_dim"
DEFAULTS = {"head_dim": _UNSAID}
