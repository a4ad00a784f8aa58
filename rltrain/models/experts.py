"""Mixtures of experts as a `config.json` describes them, in the ways of Qwen, DeepSeek, MiniMax and gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rltrain.models.entries import number, whole_number
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP in some layers.

    Attributes:
        top_k: Experts of a token.
        normalized: Whether the weights of a token's experts add up to 1, before they are scaled.
        layers: The layers that have experts, from 0.
        score: What makes the router's outputs comparable.
        correction_bias: A number for each expert is added to its score where experts are chosen, and not where they
            are weighed. It is in the checkpoint, and gradients don't reach it.
        groups: Experts are chosen from some of these groups.
        groups_taken: How many.
        scale: The weights of a token's experts are multiplied by it.
        shared_size: Width of the experts that every token goes to, all together; 0: there are none.
        shared_gate: Their output is weighed by a gate.
        limit: The gate is cut off above it and up at both ends, and with gate × σ(1.702 gate) × (up + 1) in place of
            SwiGLU; None: plain SwiGLU.
        biases: Router and experts have biases.
    """

    count: int
    top_k: int
    ffn_hidden_size: int
    normalized: bool
    layers: tuple[int, ...]
    score: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: bool = False
    groups: int = 1
    groups_taken: int = 1
    scale: float = 1.0
    shared_size: int = 0
    shared_gate: bool = False
    limit: float | None = None
    biases: bool = False


def qwen3_experts(config: Mapping[str, Any]) -> Experts:
    """Qwen3's: softmax over all experts, none shared.

    Args:
        config: With defaults, as for the others here.

    Raises:
        UserError: an entry is missing or impossible, or nothing in Megatron-core computes it; as the others here.
    """
    count, top_k = _experts_in(config, "num_experts"), whole_number(config, "num_experts_per_tok")
    step = whole_number({"decoder_sparse_step": 1, **config}, "decoder_sparse_step")
    dense = config.get("mlp_only_layers") or []
    return _checked(
        Experts(
            count=count,
            top_k=top_k,
            ffn_hidden_size=whole_number(config, "moe_intermediate_size"),
            normalized=bool(config.get("norm_topk_prob", False)),
            layers=tuple(
                i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0
            ),
        )
    )


def qwen2_experts(config: Mapping[str, Any]) -> Experts:
    """Qwen2's: the same, and an expert that every token goes to, with a gate."""
    shared = whole_number(config, "shared_expert_intermediate_size")
    whole_number(config, "num_key_value_heads")  # null, which others have, is an error to transformers here
    return replace(qwen3_experts(config), shared_size=shared, shared_gate=True)


def deepseek_experts(config: Mapping[str, Any]) -> Experts:
    """DeepSeek-V3's: sigmoid, a bias where experts are chosen, groups of experts, shared ones; dense layers first."""
    dense = whole_number(config, "first_k_dense_replace", least=0)
    return _sigmoid_experts(config, tuple(range(dense, config["num_hidden_layers"])))


def listed_experts(config: Mapping[str, Any]) -> Experts:
    """GLM-4.7 Flash's: the same, and `mlp_layer_types` says which layers are dense; without it, the first."""
    count = config["num_hidden_layers"]
    kinds = config["mlp_layer_types"]
    if kinds is None:
        kinds = ["dense"] + ["sparse"] * (count - 1)
    if not isinstance(kinds, list) or len(kinds) != count or set(kinds) - {"dense", "sparse"}:
        raise UserError(
            f"the model's config.json has mlp_layer_types {kinds}: it must have dense or sparse for each of"
            f" {count} layers."
        )
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "sparse")
    dense = config.get("first_k_dense_replace")
    if dense is not None and layers != tuple(range(dense, count)):
        raise UserError(
            f"the model's config.json has first_k_dense_replace {dense}, but mlp_layer_types gives experts to the"
            f" layers {list(layers)}."
        )
    whole_number(config, "num_key_value_heads")  # null is an error to transformers here
    return _sigmoid_experts(config, layers)


def first_or_listed_experts(config: Mapping[str, Any]) -> Experts:
    """DeepSeek-V3.2's: as DeepSeek-V3's, or as `mlp_layer_types` says."""
    return deepseek_experts(config) if config["mlp_layer_types"] is None else listed_experts(config)


def minimax_experts(config: Mapping[str, Any]) -> Experts:
    """MiniMax-M2's: sigmoid and a bias where experts are chosen; `intermediate_size` is theirs, in every layer."""
    return _checked(replace(_experts_everywhere(config), score="sigmoid", correction_bias=True))


def gpt_oss_experts(config: Mapping[str, Any]) -> Experts:
    """gpt-oss's: softmax over the chosen ones, biases, a limit; `intermediate_size` is theirs, in every layer."""
    found = _experts_everywhere(config)
    return _checked(replace(found, limit=number(config["swiglu_limit"], "swiglu_limit"), biases=True))


def _experts_everywhere(config: Mapping[str, Any]) -> Experts:
    """Experts in every layer, in place of MLPs of their size."""
    return Experts(
        count=_experts_in(config, "num_experts"),
        top_k=whole_number(config, "num_experts_per_tok"),
        ffn_hidden_size=whole_number(config, "intermediate_size"),
        normalized=True,
        layers=tuple(range(config["num_hidden_layers"])),
    )


def _sigmoid_experts(config: Mapping[str, Any], layers: tuple[int, ...]) -> Experts:
    width = whole_number(config, "moe_intermediate_size")
    found = Experts(
        count=_experts_in(config, "n_routed_experts"),
        top_k=whole_number(config, "num_experts_per_tok"),
        ffn_hidden_size=width,
        normalized=bool(config["norm_topk_prob"]),
        layers=layers,
        score="sigmoid",
        correction_bias=True,
        groups=whole_number(config, "n_group"),
        groups_taken=whole_number(config, "topk_group"),
        scale=number(config["routed_scaling_factor"], "routed_scaling_factor"),
        shared_size=width * whole_number(config, "n_shared_experts"),
    )
    if not found.normalized and found.top_k > 1:
        raise UserError(
            "the model's config.json sets norm_topk_prob to false: Megatron-core's router with sigmoid scores always"
            " normalises the weights of a token's experts."
        )
    return _with_groups(_checked(found))


def _with_groups(experts: Experts) -> Experts:
    """Groups that make a difference, and that Megatron-core chooses as transformers does."""
    groups, taken = experts.groups, experts.groups_taken
    each = experts.count // groups
    said = (
        f"the model's config.json has n_group {groups} and topk_group {taken} with {experts.count} experts, of which a"
        f" token gets {experts.top_k}"
    )
    if experts.count % groups or each < 2 or taken > groups or experts.top_k > taken * each:
        raise UserError(
            f"{said}: groups must divide the experts and hold at least two, and those taken must have enough of them."
        )
    if taken == groups:
        return replace(experts, groups=1, groups_taken=1)
    if experts.top_k // taken != 2:
        raise UserError(
            f"{said}. transformers compares groups by their best two experts, Megatron-core by as many as a token gets"
            " from each group, so the trainer supports only two per group."
        )
    return experts


def _experts_in(config: Mapping[str, Any], name: str) -> int:
    """How many experts there are: published under `name`, and under another one as transformers 5 writes it."""
    names = (name, "num_local_experts")
    counts = {each: config[each] for each in names if config.get(each)}
    if len(set(counts.values())) > 1:
        raise UserError(f"the model's config.json has {name} {counts[name]} and num_local_experts"
                        f" {counts['num_local_experts']}.")  # fmt: skip
    return whole_number({name: next(iter(counts.values()), None)}, name)


def _checked(found: Experts) -> Experts:
    if found.top_k > found.count:
        raise UserError(
            f"the model's config.json has num_experts_per_tok {found.top_k} of {found.count} experts."
        )
    if found.top_k == 1 and found.normalized:
        raise UserError(
            "the model's config.json has num_experts_per_tok 1 with norm_topk_prob: every token's expert then weighs"
            " exactly 1, and the router can't learn. Megatron-core has no such router. Train a model with two experts"
            " a token or more, or without norm_topk_prob."
        )
    return found
