"""Attention over packed sequences in plain torch, for machines without TransformerEngine.

Megatron-core's own `DotProductAttention` refuses packed sequences. This one runs torch's scaled dot product
attention on each sequence; sequences of equal length that lie next to each other share one call, so a
micro-batch sorted by length costs a few calls instead of one a sequence. No mask over all tokens is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron-core's description of packed sequences, with the lengths as Python integers.

    Reading them back from `cu_seqlens_q` would make the CPU wait for the GPU in every layer.
    """

    lengths: tuple[int, ...] = ()

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device) -> PackedSequences:
        """Causal self-attention within each of `lengths` tokens, packed one after the other."""
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, dtype=torch.int32, out=offsets[1:])
        offsets = offsets.to(device)
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
        )


class PackedAttention(MegatronModule):
    """Causal core attention. Query, key and value are [tokens, heads of this rank, head_dim]."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **kwargs: Any,  # of Megatron-core's interface: dropout and communication types that do not apply
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise NotImplementedError("context parallelism needs TransformerEngine's attention")
        if config.attention_dropout:
            raise NotImplementedError("attention dropout")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSequences | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention output, [tokens, 1, heads × head_dim]."""
        if packed_seq_params is None:
            raise ValueError("this attention takes packed sequences only")
        runs = [(length, len(list(run))) for length, run in groupby(packed_seq_params.lengths)]
        sizes = [length * count for length, count in runs]
        parts = zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
        outputs = [self._equal_lengths(q, k, v, length) for (length, _), q, k, v in parts]
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return output.unsqueeze(1)

    def _equal_lengths(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        q, k, v = (
            tensor.unflatten(0, (-1, length)).transpose(1, 2)  # [sequences, heads, length, head_dim]
            for tensor in (query, key, value)
        )
        output = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return output.transpose(1, 2).reshape(query.shape[0], -1)
