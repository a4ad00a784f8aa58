"""What distinguishes an architecture from the others that can be trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rltrain.models.experts import Experts
from rltrain.models.heads import Head
from rltrain.models.latent import LatentAttention
from rltrain.models.linear import LinearAttention
from rltrain.models.tensors import Parameter
from rltrain.models.windows import WindowRule

NO_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (None, False)}


@dataclass(frozen=True)
class Family:
    """The properties that all models of an architecture share.

    Attributes:
        model_type: transformers' name of it, which decides there what a model computes.
        same_as: The `model_type` of transformers' that computes the same, where a model comes with code of its own.
        qkv_bias: On the query, key and value projections; the name of an entry: as that says.
        biases: On the projection behind attention, on routers and on experts.
        sinks: Every head has a number that its softmax takes as one more score, whose share goes nowhere.
        qk_norm: RMSNorm on queries and keys; the name of an entry: as that says.
        whole_qk_norm: On all heads together, not on each.
        experts: Reads the experts in place of MLPs.
        latent: Reads the sizes of latent attention.
        linear: Reads which layers have linear attention, and its sizes.
        output_gate: The outputs of attention are weighed by gates, which the query projection computes too.
        pre_norms: RMSNorm on what attention and MLP take.
        post_norms: RMSNorm on the outputs of attention and MLP, before they are added.
        zero_centered_norms: All norms multiply by 1 + their weight.
        gelu: The MLP's gate has tanh's approximation of GELU, not SiLU.
        root_embedding: Embeddings are multiplied by √hidden_size, rounded to the weights' type.
        query_scalar: Scores are multiplied by 1/√`query_pre_attn_scalar`.
        soft_caps: Of scores, `attn_logit_softcapping`, and of logits, `final_logit_softcapping`.
        ropes: The types of rotary embedding that there are, if not all.
        usual_rope: What transformers takes if `config.json` says nothing of rotary embeddings but a base.
        local_rope: Layers with a window have a rotary embedding of their own: the entry with its base.
        rotary_interleaved: Neighbours are rotated with each other, not halves.
        partial_rotary: Part of a head may be rotated alone.
        partial_beside: SGLang reads which part beside `rope_parameters` alone.
        unrotated_layers: Some layers have no rotary embedding, as `no_rope_layers` says.
        windows: Which layers have a sliding window; None: none can have one.
        attention: What `layer_types` calls attention without a window.
        multipliers: Embeddings, attention, residuals and logits are scaled.
        null_head_dim: `head_dim` may be null, which means the same as its absence.
        extra_heads: Checkpoints may have layers behind the last one, or `mtp_layers` or `mtp` beside them, which
            predict further tokens and are not trained.
        head: The names of one that can be trained; None: it can't.
        only: Entries that change the computation, with the values that are supported.
        defaults: What transformers takes for an entry that `config.json` lacks.
        tensors: Parameters within a layer whose tensors have other names than Llama's, or lie differently. {} stands
            for the number of an expert.
    """

    model_type: str
    same_as: str | None = None
    qkv_bias: bool | str = False
    biases: bool = False
    sinks: bool = False
    qk_norm: bool | str = False
    experts: Callable[[Mapping[str, Any]], Experts] | None = None
    latent: Callable[[Mapping[str, Any]], LatentAttention] | None = None
    linear: Callable[[Mapping[str, Any]], LinearAttention] | None = None
    output_gate: bool = False
    whole_qk_norm: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    zero_centered_norms: bool = False
    gelu: bool = False
    root_embedding: bool = False
    query_scalar: bool = False
    soft_caps: bool = False
    ropes: tuple[str, ...] = ()
    usual_rope: Mapping[str, Any] | None = None
    local_rope: str | None = None
    rotary_interleaved: bool = False
    partial_rotary: bool = False
    partial_beside: bool = False
    unrotated_layers: bool = False
    windows: WindowRule | None = None
    attention: str = "full_attention"
    multipliers: bool = False
    null_head_dim: bool = False
    extra_heads: bool = False
    head: Head | None = None
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: NO_BIAS)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Parameter] = field(default_factory=dict)


# What the configuration classes of transformers have in common.
COMMON = {
    "head_dim": None,  # hidden_size / num_attention_heads
    "num_key_value_heads": None,  # num_attention_heads
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}
