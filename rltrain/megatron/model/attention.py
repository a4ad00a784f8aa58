"""Attention over packed sequences in plain torch, for machines without TransformerEngine.

Megatron-core's own `DotProductAttention` refuses packed sequences. This one runs torch's scaled dot product
attention on each sequence; sequences of equal length that lie next to each other share one call, so a
micro-batch sorted by length costs a few calls instead of one a sequence (short ones on a CPU: `layers.joined`). No mask
over all tokens is made.
A GPU has a kernel for sequences of any lengths, in 16-bit types (flash attention): there it is one call in all.

With context parallelism every rank gathers all keys and values and computes the rows of its own queries. Sequences
that share their beginnings are in `prefix_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from rltrain.megatron.model.context_parallel import attended_keys, gather_tokens, whole_order
from rltrain.megatron.model.layers.joined import Joined, attend_joined, join
from rltrain.megatron.model.layers.sinks import narrow, new_sinks, put_first, put_first_of_each, widen
from rltrain.megatron.model.layers.soft_cap import capped_attention
from rltrain.megatron.model.prefix_attention import Call, gather_keys, plan_calls

# Queries of a call with a mask: a longer one computes too much that the mask then hides.
_MASKED_QUERIES = 256


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron-core's description of packed sequences, with the lengths as Python integers.

    Reading them back from `cu_seqlens_q` would make the CPU wait for the GPU in every layer.
    """

    lengths: tuple[int, ...] = ()
    order: Tensor | None = None  # of context parallel ranks' tokens, see `whole_order`
    attended: Tensor | None = (
        None  # the keys of this rank's queries, where they are not the queries' own tokens
    )
    own_offsets: tuple[Tensor, Tensor] | None = None  # and where its chunks of queries and their keys begin
    positions: Tensor | None = None  # of tokens in their sequences, where sequences share tokens
    calls: tuple[Call, ...] | None = None  # and how attention is computed there
    joined: Joined | None = None  # how that of the first sequences is computed, where they are short

    @classmethod
    def from_lengths(
        cls, lengths: list[int], device: torch.device, context_size: int = 1, context_rank: int = 0
    ) -> PackedSequences:
        """Causal self-attention within each of `lengths` tokens, packed one after the other.

        Args:
            lengths: Of whole sequences, also where context parallel ranks share them.
        """
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, dtype=torch.int32, out=offsets[1:])
        offsets = offsets.to(device)
        longest = max(lengths)
        order, attended, own_offsets = None, None, None
        if context_size > 1:
            keys, *own = attended_keys(lengths, context_size, context_rank)
            order = torch.from_numpy(whole_order(lengths, context_size)).to(device)
            attended = torch.from_numpy(keys).to(device)
            own_offsets = (torch.from_numpy(own[0]).to(device), torch.from_numpy(own[1]).to(device))
        return cls(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
            order=order,
            attended=attended,
            own_offsets=own_offsets,
            joined=join(lengths) if context_size == 1 and device.type == "cpu" else None,
        )

    @classmethod
    def sharing(
        cls, lengths: list[int], keys: list[NDArray[np.int64]], families: list[int], device: torch.device
    ) -> PackedSequences:
        """Segments of sequences that share their beginnings; the arguments are those of `plan_calls`."""
        calls, attended = plan_calls(lengths, keys, families, masks=device.type == "cpu")
        seen = [len(each) for each in keys]
        offsets, of_keys = (
            torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32)).to(device) for sizes in (lengths, seen)
        )
        positions = np.concatenate(
            [np.arange(end - own, end) for own, end in zip(lengths, seen, strict=True)]
        )
        # For rotary embeddings it is one sequence: their angles are looked up for every token (`forward_backward`).
        whole = torch.tensor([0, sum(lengths)], dtype=torch.int32, device=device)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            cu_seqlens_q_padded=whole,
            cu_seqlens_kv_padded=whole,
            max_seqlen_q=max(seen),
            max_seqlen_kv=max(seen),
            lengths=tuple(lengths),
            attended=torch.from_numpy(attended).to(device),
            own_offsets=(offsets, of_keys),
            positions=torch.from_numpy(positions).to(device),
            calls=tuple(calls),
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
        soft_cap: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,  # of Megatron-core's interface: dropout and communication types that do not apply
    ) -> None:
        super().__init__(config=config)
        learnable = config.softmax_type == "learnable"
        # Named as Megatron-core's own.
        self.register_parameter("softmax_offset", new_sinks(config, pg_collection) if learnable else None)
        if config.attention_dropout:
            raise NotImplementedError("attention dropout")
        self.softmax_scale = softmax_scale
        self.soft_cap = soft_cap  # no kernel has it, so that there is one way on all devices
        window, layers = config.window_size, config.window_attn_skip_freq
        has_window = window and is_layer_window_attention(window, layers, layer_number)
        self.before = window[0] if has_window else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSequences | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention output, [tokens, heads × head_dim]."""
        if packed_seq_params is None:
            raise ValueError("this attention takes packed sequences only")
        if self.softmax_offset is None:
            return self._packed(query, key, value, packed_seq_params)
        assert self.softmax_scale is not None
        heads = query.shape[1]
        query, key, value = widen(query, key, value, self.softmax_offset, self.softmax_scale)
        return narrow(self._packed(query, key, value, packed_seq_params), heads)

    def _packed(
        self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: PackedSequences
    ) -> Tensor:
        # The kernel's windows would leave a sink behind.
        is_hidden = self.softmax_offset is not None and self.before is not None
        if has_varlen_kernel(query) and not is_hidden and self.soft_cap is None:
            return self._all_lengths(query, key, value, packed_seq_params)
        if packed_seq_params.calls is not None:
            return self._sharing(query, key, value, packed_seq_params)
        joined = packed_seq_params.joined
        if joined is not None and self._is_plain(joined.longest):
            end, lengths = joined.tokens, packed_seq_params.lengths[joined.sequences :]
            output = attend_joined(query[:end], key[:end], value[:end], joined, self.softmax_scale)
            if not lengths:
                return output
            rest = self._by_length(query[end:], key[end:], value[end:], lengths, packed_seq_params)
            return torch.cat([output, rest])
        return self._by_length(query, key, value, packed_seq_params.lengths, packed_seq_params)

    def _is_plain(self, length: int) -> bool:
        """Whether tokens of sequences of this length see all that are before them, and nothing else counts."""
        is_narrow = self.before is not None and self.before < length - 1
        return not is_narrow and self.soft_cap is None and self.softmax_offset is None

    def _by_length(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        packed_seq_params: PackedSequences,
    ) -> Tensor:
        """Attention of sequences of these lengths: a call for neighbours of equal length."""
        runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        sizes = [length * count for length, count in runs]
        group = parallel_state.get_context_parallel_group()
        ranks = group.size()
        if packed_seq_params.order is not None:
            both = gather_tokens(torch.cat([key, value], dim=-1), packed_seq_params.order, group)
            key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        parts = zip(
            runs, query.split([size // ranks for size in sizes]), key.split(sizes), value.split(sizes),
            strict=True,
        )  # fmt: skip
        outputs = [
            self._equal_lengths(q, k, v, length, ranks, group.rank()) for (length, _), q, k, v in parts
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _all_lengths(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Attention of sequences of any lengths in one call."""
        if packed.order is not None:
            assert packed.attended is not None
            both = gather_tokens(
                torch.cat([key, value], dim=-1), packed.order, parallel_state.get_context_parallel_group()
            )
            both = both.index_select(0, packed.attended)
            key, value = (part.contiguous() for part in both.split([key.shape[-1], value.shape[-1]], dim=-1))
        elif packed.attended is not None:
            key, value = (part.contiguous() for part in gather_keys(key, value, packed.attended))
        has_sinks = self.softmax_offset is not None
        return varlen_attention(
            query, key, value, packed, self.softmax_scale, self.before, has_sinks=has_sinks
        ).flatten(1)

    def _sharing(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Attention of segments that share keys, in the calls that were planned."""
        assert packed.attended is not None and packed.calls is not None
        key, value = gather_keys(key, value, packed.attended)
        seen = [call.count * call.keys for call in packed.calls]
        parts = zip(
            packed.calls, query.split([call.count * call.queries for call in packed.calls]), key.split(seen),
            value.split(seen), strict=True,
        )  # fmt: skip
        assert packed.positions is not None
        positions = packed.positions.split([call.count * call.queries for call in packed.calls])
        outputs = []
        for (call, *own), at in zip(parts, positions, strict=True):
            q, k, v = (each.unflatten(0, (call.count, -1)).transpose(1, 2) for each in own)
            mask = call.mask
            if mask is not None and self.before is not None:
                mask = mask & (at[:, None] - at <= self.before)
            output = self._attend(q, k, v) if mask is None else self._masked(q, k, v, mask)
            outputs.append(output.transpose(1, 2).reshape(call.count * call.queries, -1))
        return torch.cat(outputs)

    def _equal_lengths(
        self, query: Tensor, key: Tensor, value: Tensor, length: int, ranks: int, rank: int
    ) -> Tensor:
        """Attention within sequences of `length` tokens, of which this rank has `length / ranks` queries."""
        q, k, v = (
            tensor.unflatten(0, (-1, tokens)).transpose(1, 2)  # [sequences, heads, tokens, head_dim]
            for tensor, tokens in ((query, length // ranks), (key, length), (value, length))
        )
        if ranks == 1:
            output = self._attend(q, k, v)
        else:
            front, back = q.chunk(2, dim=2)
            size = front.shape[2]
            ends = ((rank + 1) * size, (2 * ranks - rank) * size)
            outputs = [self._attend(part, k[:, :, :end], v[:, :, :end])
                       for part, end in zip((front, back), ends, strict=True)]  # fmt: skip
            output = torch.cat(outputs, dim=2)
        return output.transpose(1, 2).reshape(query.shape[0], -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries of the last tokens to all keys up to their own, or to those of the window."""
        keys = k.shape[2]
        before = keys - q.shape[2]
        is_narrow = self.before is not None and self.before < keys - 1
        if q.is_cuda and not is_narrow and self.soft_cap is None:
            if self.softmax_offset is not None:
                k, v = put_first(k, v)
            return attend_without_mask(q, k, v, self.softmax_scale)
        if before == 0 and not is_narrow and self.soft_cap is None and self.softmax_offset is None:
            return self._masked(q, k, v, None)
        outputs = []
        for part in q.split(_MASKED_QUERIES, dim=2):
            start = 0 if self.before is None else max(0, before - self.before)
            end = before + part.shape[2]
            mask = torch.ones(part.shape[2], end - start, dtype=torch.bool, device=q.device).tril(
                before - start
            )
            if self.before is not None:
                mask = mask.triu(before - start - self.before)
            outputs.append(self._masked(part, k[:, :, start:end], v[:, :, start:end], mask))
            before = end
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention as the mask says, [queries, keys] bool; None: causal, of as many keys as queries.

        The mask says nothing of sinks, with which there is one.
        """
        if self.soft_cap is not None:
            assert mask is not None
            return capped_attention(q, k, v, mask, self.softmax_scale, self.soft_cap)
        if self.softmax_offset is not None:
            assert mask is not None
            k, v = put_first(k, v)
            mask = F.pad(mask, (1, 0), value=True)
            if q.is_cuda:  # the kernel with masks does not know of heads that share keys
                k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For checkpoints: the sinks are split over tensor parallel ranks."""
        if self.softmax_offset is None:
            whole: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            return whole
        sinks = {"softmax_offset": self.softmax_offset}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            sinks, prefix, {"softmax_offset": 0}, sharded_offsets
        )
        return sharded


def has_varlen_kernel(query: Tensor) -> bool:
    """Whether a GPU has flash attention for sequences of any lengths for these [tokens, heads, head_dim]."""
    size = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or size % 8 or size > 256:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSequences,
    scale: float | None,
    before: int | None = None,
    *,
    has_sinks: bool = False,
) -> Tensor:
    """Causal attention of packed sequences, [tokens, heads, head_dim].

    Args:
        key, value: Those that `packed.attended` names, if it does.
        before: Tokens before its own that a query sees; None: all.
        has_sinks: They are in the queries; without `before`.
    """
    longest, size = int(packed.max_seqlen_kv), value.shape[-1]
    if size != query.shape[-1]:  # latent attention's: the kernel wants one size of all three
        value = F.pad(value, (0, query.shape[-1] - size))
    of_queries, of_keys = packed.own_offsets or (packed.cu_seqlens_q, packed.cu_seqlens_kv)
    if has_sinks:
        key, value, of_keys = put_first_of_each(key, value, of_keys)
        longest += 1
    output = varlen_attn(
        query, key, value, of_queries, of_keys, longest, longest,
        scale=scale, window_size=(-1 if before is None else before, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output[..., :size]


def attend_without_mask(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Queries of the last tokens to all keys up to their own, where only kernels without a mask save memory.

    The kernel for fp32 does not know of heads that share keys, and torch's plain one keeps all scores.

    Args:
        q, k, v: [sequences, heads, tokens, head_dim].
    """
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    bias = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
