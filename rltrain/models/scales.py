"""What a model multiplies embeddings, scores and logits by, and how it bounds them, from its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rltrain.models.entries import number
from rltrain.models.families.family import Family
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Multipliers:
    """What embeddings, the outputs of attention and MLP, and logits are multiplied by.

    Attributes:
        attention: Of queries with keys; None: 1 / √head_dim.
    """

    embedding: float = 1.0
    attention: float | None = None
    residual: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True)
class SoftCaps:
    """What x becomes c · tanh(x / c) with; None: it stays as it is.

    Attributes:
        scores: c for products of queries with keys.
        logits: c for the output layer's.
    """

    scores: float | None = None
    logits: float | None = None


def read_multipliers(config: Mapping[str, Any], family: Family) -> Multipliers:
    """Those of a `config.json` with defaults.

    Raises:
        UserError: names an entry that is not a number above 0.
    """
    if family.query_scalar:
        return Multipliers(attention=number(config["query_pre_attn_scalar"], "query_pre_attn_scalar") ** -0.5)
    if not family.multipliers:
        return Multipliers()
    names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    for name in names:
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"the model's config.json has {name} {value!r}: it must be a number above 0.")
    embedding, attention, residual, logits = (float(config[name]) for name in names)
    return Multipliers(embedding, attention, residual, 1 / logits)


def read_soft_caps(config: Mapping[str, Any]) -> SoftCaps:
    """Those of a `config.json` with defaults.

    Raises:
        UserError: names an entry that is not a number above 0.
    """
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    scores, logits = (None if config[name] is None else number(config[name], name) for name in names)
    return SoftCaps(scores, logits)
