"""Rotary position embeddings as a `config.json` describes them, in the style of transformers 4 or 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rltrain.models.entries import number, whole_number
from rltrain.models.lengths import Limit
from rltrain.run.errors import UserError

_STYLES = ("rope_scaling", "rope_parameters")  # of transformers 4 and 5
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_WHY_NOT = {
    "longrope": " It is supported for Phi-3 only.",
    "su": ' Its name is "longrope" now: write that.',
    "dynamic": " transformers scales long sequences only, each by its own length, and SGLang scales all by one factor:"
    " engines and trainer would be different models.",
}
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Rope:
    """How the frequencies follow from the base; the names are transformers'.

    Attributes:
        kind: `default`, `linear`, `llama3`, `yarn` or `longrope`.
        percent: Share of a head's dimensions that is rotated.
        original_positions: Of the training before the scaling.
        mscale_all_dim: YaRN's growth of all products of queries with keys, which only latent attention has.
        mscale: The like of rotated ones, part of `attention_factor`.
        attention_factor: Rotated queries and keys are multiplied by it.
        slower: What LongRoPE divides each frequency by in sequences of up to `original_positions` tokens; in longer
            ones it divides them by other numbers.
    """

    theta: float
    kind: str = "default"
    percent: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale_all_dim: float = 0.0
    mscale: float = 1.0
    slower: tuple[float, ...] = ()

    @property
    def limit(self) -> Limit | None:
        """How long sequences may be."""
        if self.kind != "longrope":
            return None
        return Limit(
            self.original_positions,
            f"sequences of more than {self.original_positions} tokens ({_ORIGINAL}) have the rotary embeddings of"
            " long_factor, which transformers decides for each sequence and SGLang for a whole batch",
        )


def read_rope(
    config: Mapping[str, Any], *, partial: bool, kinds: tuple[str, ...] = (), latent: bool = False
) -> Rope:
    """The rotary embedding of a `config.json` whose defaults have been filled in.

    Args:
        partial: Whether part of a head may be rotated alone.
        kinds: Those that the architecture has, if not all.
        latent: Whether the model has latent attention.

    Raises:
        UserError: a kind that we don't have, an entry that is missing or no number, or two that disagree.
    """
    given = {style: config[style] for style in _STYLES if config.get(style)}
    for style, value in given.items():
        if not isinstance(value, dict) or any(isinstance(each, dict) for each in value.values()):
            raise UserError(
                f"the model's config.json has {style} {value}: only one for all layers is supported."
            )
    if len(given) == 2 and given[_STYLES[0]] != given[_STYLES[1]]:
        raise UserError(
            f"the model's config.json has both rope_scaling {given['rope_scaling']} and rope_parameters"
            f" {given['rope_parameters']}; transformers uses only the first, with its default rope_theta. Write one"
            " rope_parameters with all entries."
        )
    entries: Mapping[str, Any] = next(iter(given.values()), {})
    kind = entries.get("rope_type", entries.get("type", "default"))
    if not isinstance(kind, str) or kind not in (kinds or _NEEDED):
        raise UserError(
            f"the model's config.json scales rotary embeddings with rope_type {kind!r}; supported are"
            f" {', '.join(map(repr, kinds or _NEEDED))}.{_WHY_NOT.get(str(kind), '')}"
        )
    theta = number(entries.get("rope_theta", config.get("rope_theta", 10000.0)), "rope_theta")
    percent = number(
        entries.get("partial_rotary_factor", config["partial_rotary_factor"]), "partial_rotary_factor"
    )
    if percent > 1 or (percent != 1.0 and (kind not in ("default", "longrope") or not partial)):
        raise UserError(
            f"the model's config.json sets partial_rotary_factor {percent}, which the trainer does not support for"
            f" this architecture with rope_type {kind!r}."
        )
    if kind == "longrope":
        return _longrope(config, entries, Rope(theta, kind, percent))
    needed = {name: number(entries.get(name), f"{name} of rope_type {kind!r}") for name in _NEEDED[kind]}
    rope = Rope(
        theta,
        kind,
        percent,
        needed.get("factor", 1.0),
        needed.get("low_freq_factor", 1.0),
        needed.get("high_freq_factor", 1.0),
    )
    if latent and kind != "default" and entries.get("mscale_all_dim"):
        rope = replace(rope, mscale_all_dim=number(entries["mscale_all_dim"], "mscale_all_dim"))
    if latent and kind == "yarn" and entries.get("mscale") is not None:
        rope = replace(rope, mscale=number(entries["mscale"], "mscale"))
    if kind not in ("llama3", "yarn"):
        return rope
    rope = replace(rope, original_positions=_original(config, entries))
    return _yarn(rope, entries) if kind == "yarn" else rope


def read_ropes(config: Mapping[str, Any], local_base: str) -> tuple[Rope, Rope]:
    """The rotary embeddings of layers without a window and with one, which differ in their bases.

    Args:
        config: With defaults.
        local_base: The entry with the base of layers with a window, in the style of transformers 4.

    Raises:
        UserError: as `read_rope`. SGLang scales neither of the two, so that other kinds than `default` are refused.
    """
    nested = config.get("rope_parameters") or {}
    if not isinstance(nested, dict) or nested.keys() - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"the model's config.json has rope_parameters {nested}: they must be for full_attention and"
            " sliding_attention."
        )
    if config.get("rope_scaling") and nested:
        raise UserError(
            "the model's config.json has both rope_scaling and rope_parameters: remove the first."
        )
    full, sliding = nested.get("full_attention") or {}, nested.get("sliding_attention") or {}
    ropes = (
        {**config, "rope_parameters": full},
        {**config, "rope_parameters": sliding, "rope_scaling": None, "rope_theta": config[local_base]},
    )
    whole, local = (read_rope(each, partial=False, kinds=("default",)) for each in ropes)
    return whole, local


def _original(config: Mapping[str, Any], entries: Mapping[str, Any]) -> int:
    own = entries.get(_ORIGINAL, config["max_position_embeddings"])
    beside = config.get(_ORIGINAL, own)
    if beside != own:
        raise UserError(
            f"the model's config.json has {_ORIGINAL} {beside} beside its rotary embedding, where it is {own}. Write"
            " it only into rope_parameters (or rope_scaling)."
        )
    return int(number(own, _ORIGINAL))


def _longrope(config: Mapping[str, Any], entries: Mapping[str, Any], rope: Rope) -> Rope:
    """LongRoPE, https://arxiv.org/abs/2402.13753, of sequences that are not longer than before it."""
    _original(config, {_ORIGINAL: config[_ORIGINAL], **entries})
    original = whole_number(config, _ORIGINAL, least=2)
    factor = whole_number(config, "max_position_embeddings") / original
    growth = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    # SGLang reads neither of the first two, and transformers neither of the others.
    implied = {"factor": factor, "attention_factor": growth, "short_mscale": None, "long_mscale": None}
    for name, value in implied.items():
        given = entries.get(name)
        if given is not None and (isinstance(given, bool) or given != value):
            raise UserError(
                f"the model's config.json has {name} {given} in its longrope: transformers and SGLang would be"
                " different models. Leave it out."
            )
    factors = {name: entries.get(name) for name in ("short_factor", "long_factor")}
    for name, values in factors.items():
        if not isinstance(values, list) or not values or not all(_is_positive(each) for each in values):
            raise UserError(
                f"the model's config.json has {name} {values}: it must be a list of numbers above 0."
            )
    slower = tuple(float(each) for each in factors["short_factor"] or ())
    return replace(rope, original_positions=original, attention_factor=growth, slower=slower)


def _is_positive(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and value > 0


def _yarn(rope: Rope, entries: Mapping[str, Any]) -> Rope:
    """YaRN, https://arxiv.org/abs/2309.00071, with transformers' choices for what is left out."""

    def magnitude(weight: float = 1.0) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    above, below = entries.get("mscale"), entries.get("mscale_all_dim")
    attention = entries.get("attention_factor")
    if attention is None:
        attention = magnitude(above) / magnitude(below) if above and below else magnitude()
    return replace(
        rope,
        attention_factor=number(attention, "attention_factor"),
        beta_fast=number(entries.get("beta_fast") or 32, "beta_fast"),
        beta_slow=number(entries.get("beta_slow") or 1, "beta_slow"),
        truncate=bool(entries.get("truncate", True)),
    )
