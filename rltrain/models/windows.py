"""Sliding windows of attention as a `config.json` describes them: which layers have one, and of how many tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rltrain.models.entries import whole_number
from rltrain.run.errors import UserError

_KINDS = {"sliding_attention": True, "full_attention": False}  # of `layer_types`


@dataclass(frozen=True)
class Window:
    """Layers in which a token sees few others.

    Attributes:
        size: Tokens that it sees, itself among them.
        layers: Those that have the window, from 0.
    """

    size: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class WindowRule:
    """How the `config.json` of an architecture says which layers have a window of `sliding_window` tokens.

    Attributes:
        has_window: Of `config.json` (with defaults) and a layer, from 0.
        reads: Entries with whole numbers that `has_window` reads.
        switched: There are windows only if `use_sliding_window` is true.
        listed: `layer_types` names each layer's kind, and comes before `has_window`.
        fixed: `layer_types` may only repeat what `has_window` says: SGLang does not read it.
        in_sglang: SGLang has these windows too. Elsewhere it lets every token see all before it.
    """

    has_window: Callable[[Mapping[str, Any], int], bool] = lambda config, layer: True
    reads: tuple[str, ...] = ()
    switched: bool = False
    listed: bool = False
    fixed: bool = False
    in_sglang: bool = False


def read_window(
    config: Mapping[str, Any], rule: WindowRule | None, usual: str = "full_attention"
) -> Window | None:
    """The windows of a `config.json` whose defaults have been filled in; None if every token sees all before it.

    Args:
        rule: None for an architecture that has no windows.
        usual: What `layer_types` calls a layer without.

    Raises:
        UserError: entries that disagree, or make no sense.
    """
    listed = _listed(config, usual, listed=rule is not None and rule.listed)
    if rule is None:
        return None
    size = config["sliding_window"]
    if size is None or (rule.switched and not config["use_sliding_window"]):
        if any(listed or ()) or (rule.listed and not rule.switched and listed is None):
            raise UserError(
                "the model's config.json has layers with sliding_attention, but no sliding_window"
                f"{' that use_sliding_window switches on' if rule.switched else ''}."
            )
        return None
    size = whole_number(config, "sliding_window")
    if not rule.listed and config.get("layer_types") is not None:
        raise UserError(
            f"the model's config.json has sliding_window {size} and layer_types, which transformers ignores for its"
            " architecture: every layer has the window. Remove layer_types."
        )
    if listed is None:
        for name in rule.reads:
            whole_number(config, name, least=0)
    layers = range(config["num_hidden_layers"])
    chosen = listed if listed is not None else [rule.has_window(config, layer) for layer in layers]
    if rule.fixed and chosen != [rule.has_window(config, layer) for layer in layers]:
        raise UserError(
            f"the model's config.json has layer_types {config['layer_types']}: SGLang gives its architecture windows in"
            " other layers. Leave layer_types out."
        )
    found = tuple(layer for layer in layers if chosen[layer])
    return Window(size, found) if found else None


def _listed(config: Mapping[str, Any], usual: str, *, listed: bool) -> list[bool] | None:
    """Which layers have a window, as `layer_types` says; None if it is left out."""
    kinds = config.get("layer_types")
    if not kinds and not (listed and kinds is not None):
        return None
    allowed = set(_KINDS) if listed else {usual}
    if not isinstance(kinds, list) or (others := {str(each) for each in kinds} - allowed):
        shown = ", ".join(sorted(others)) if isinstance(kinds, list) else kinds
        raise UserError(
            f"the model's config.json sets layer_types to {shown}, which the trainer does not support."
        )
    if listed and len(kinds) != config["num_hidden_layers"]:
        raise UserError(
            f"the model's config.json has {len(kinds)} layer_types for {config['num_hidden_layers']} layers."
        )
    return [_KINDS.get(each, False) for each in kinds]


def check_engines(
    window: Window | None, rule: WindowRule | None, longest: int | None, hf_checkpoint: str
) -> None:
    """Refuse sequences longer than a window that SGLang's engines would not have: they would be another model.

    Args:
        longest: Tokens of the longest sequence that engines generate; None: there is no limit.
        hf_checkpoint: For the message.

    Raises:
        UserError: names the flag that helps.
    """
    if window is None or rule is None or rule.in_sglang or (longest is not None and longest <= window.size):
        return
    raise UserError(
        f"{hf_checkpoint}/config.json has attention with a sliding window of {window.size} tokens. SGLang has no"
        " window for this architecture, so beyond it engines and trainer would be different models. Give"
        f" --rollout-max-context-len {window.size} or less."
    )
