"""Attention over packed sequences in plain torch, for machines without TransformerEngine.

Megatron-core's own `DotProductAttention` refuses packed sequences. This one runs torch's scaled dot product
attention on each sequence; sequences of equal length that lie next to each other share one call, so a
micro-batch sorted by length costs a few calls instead of one a sequence. No mask over all tokens is made.

With context parallelism every rank gathers all keys and values and computes the rows of its own queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rltrain.megatron.context_parallel import gather_tokens, whole_order


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron-core's description of packed sequences, with the lengths as Python integers.

    Reading them back from `cu_seqlens_q` would make the CPU wait for the GPU in every layer.
    """

    lengths: tuple[int, ...] = ()
    order: Tensor | None = None  # of context parallel ranks' tokens, see `whole_order`

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device, context_size: int = 1) -> PackedSequences:
        """Causal self-attention within each of `lengths` tokens, packed one after the other.

        Args:
            lengths: Of whole sequences, also where context parallel ranks share them.
        """
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, dtype=torch.int32, out=offsets[1:])
        offsets = offsets.to(device)
        longest = max(lengths)
        order = torch.from_numpy(whole_order(lengths, context_size)).to(device) if context_size > 1 else None
        return cls(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
            order=order,
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
        group = parallel_state.get_context_parallel_group()
        share = group.size()
        if packed_seq_params.order is not None:
            both = gather_tokens(torch.cat([key, value], dim=-1), packed_seq_params.order, group)
            key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        parts = zip(
            runs, query.split([size // share for size in sizes]), key.split(sizes), value.split(sizes),
            strict=True,
        )  # fmt: skip
        outputs = [
            self._equal_lengths(q, k, v, length, share, group.rank()) for (length, _), q, k, v in parts
        ]
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return output.unsqueeze(1)

    def _equal_lengths(
        self, query: Tensor, key: Tensor, value: Tensor, length: int, share: int, rank: int
    ) -> Tensor:
        """Attention within sequences of `length` tokens, of which this rank has `length / share` queries."""
        q, k, v = (
            tensor.unflatten(0, (-1, tokens)).transpose(1, 2)  # [sequences, heads, tokens, head_dim]
            for tensor, tokens in ((query, length // share), (key, length), (value, length))
        )
        if share == 1:
            output = self._attend(q, k, v)
        else:
            front, back = q.chunk(2, dim=2)
            size = front.shape[2]
            ends = ((rank + 1) * size, (2 * share - rank) * size)
            outputs = [self._attend(part, k[:, :, :end], v[:, :, :end])
                       for part, end in zip((front, back), ends, strict=True)]  # fmt: skip
            output = torch.cat(outputs, dim=2)
        return output.transpose(1, 2).reshape(query.shape[0], -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries of the last tokens to all keys up to their own."""
        queries, keys = q.shape[2], k.shape[2]
        mask = None
        if queries != keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
