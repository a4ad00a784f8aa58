"""Multi-head latent attention without TransformerEngine, and its rotary embedding as `config.json` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rltrain.megatron.device import device
from rltrain.models.latent import NORM_EPS
from rltrain.models.rope import Rope


class WholeLinear(torch.nn.Module):
    """A linear layer that every tensor parallel rank has whole, as TransformerEngine's `duplicated` one."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        **kwargs: Any,  # of Megatron-core's interface: names of communication buffers and the like
    ) -> None:
        super().__init__()
        where = torch.device("cpu" if config.use_cpu_initialization else "cuda")
        weight = torch.empty(output_size, input_size, dtype=torch.float32, device=where)
        init_method(weight)
        self.weight = torch.nn.Parameter(weight.to(config.params_dtype))
        # Its gradient is summed over tensor parallel ranks, each of which saw other tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """The product, and no bias."""
        return F.linear(x, self.weight), None


def latent_attention(backend: BackendSpecProvider) -> ModuleSpec:
    """The attention of a layer in plain torch, named as TransformerEngine's."""
    # Megatron-core compares with this name to know that a layer is not split, and TransformerEngine is not there.
    multi_latent_attention.TELinear = WholeLinear
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column_parallel_linear(),
            linear_q_down_proj=WholeLinear,
            linear_q_up_proj=backend.column_parallel_layer_norm_linear(),
            linear_kv_down_proj=WholeLinear,
            linear_kv_up_proj=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=IdentityOp,
            kv_layernorm=IdentityOp,
        ),
    )


class ScaledRotary(RotaryEmbedding):
    """Angles of given frequencies, and what rotated queries and keys are multiplied by."""

    def __init__(self, frequencies: Tensor, factor: float, kv_channels: int) -> None:
        super().__init__(kv_channels, rotary_percent=1.0)
        self.inv_freq: Tensor = frequencies.to(device())
        self.factor = factor
        self.positions: Tensor | None = None  # of the next tokens, where they don't follow from the lengths

    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """Angles, [tokens, 1, 1, rotated], and the factor."""
        angles = super().forward(max_seq_len, *args, **kwargs)
        return angles if self.positions is None else angles.index_select(0, self.positions), self.factor


def complete_latent_attention(
    layers: Iterable[Any], rope: Rope, frequencies: Tensor, rotated_size: int
) -> None:
    """Give every layer its rotary embedding, and its inner norms the epsilon that transformers takes."""
    rotary = ScaledRotary(frequencies, rope.attention_factor, rotated_size)
    for layer in layers:
        attention = layer.self_attention
        attention.rotary_pos_emb = rotary
        attention.register_forward_pre_hook(partial(_note_positions, rotary), with_kwargs=True)
        for name in ("linear_q_up_proj", "linear_kv_up_proj"):
            projection = getattr(attention, name, None)  # TransformerEngine's calls it eps
            for each in ("layer_norm_eps", "eps"):
                if hasattr(projection, each):
                    setattr(projection, each, NORM_EPS)


def _note_positions(
    rotary: ScaledRotary, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Also where a layer is computed again for its gradients: Megatron-core asks for angles in every layer."""
    rotary.positions = getattr(kwargs.get("packed_seq_params"), "positions", None)
