"""Attention of a decoding step on a CPU: one call for the whole batch.

SGLang's `torch_native` backend, the one for a plain CPU, goes through the requests one after the other, in every layer:
half the time of a step of a small model. The backend here is the same but for decoding, where it gathers the keys and
values of all requests, padded to the longest, and calls torch once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# Past this many entries of padding for each that is used, one call costs more than it saves.
MOST_PADDING = 1.0


def use_batched_decoding() -> None:
    """Take it for SGLang's `torch_native`. Sums depend on the longest request then: not for deterministic inference."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    class BatchedDecoding(TorchNativeAttnBackend):
        def init_forward_metadata(self, forward_batch: Any) -> None:
            super().init_forward_metadata(forward_batch)
            self.found: tuple[torch.Tensor, torch.Tensor] | None = None
            is_plain = forward_batch.encoder_lens is None and not self.use_sliding_window_kv_pool
            if is_plain and forward_batch.forward_mode.is_decode():
                table = self.req_to_token_pool.req_to_token
                self.found = cache_entries(table, forward_batch.req_pool_indices, forward_batch.seq_lens)

        def forward_decode(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            layer: Any,
            forward_batch: Any,
            **options: Any,
        ) -> torch.Tensor:
            is_plain = layer.qk_head_dim == layer.v_head_dim and (layer.sliding_window_size or -1) < 0
            others = options.keys() - {"save_kv_cache"}
            if (
                self.found is None
                or others
                or not is_plain
                or layer.is_cross_attention
                or k is None
                or v is None
            ):
                output: torch.Tensor = super().forward_decode(q, k, v, layer, forward_batch, **options)
                return output
            if options.get("save_kv_cache", True):
                place = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
                self.token_to_kv_pool.set_kv_buffer(layer, place, k, v)
            keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
            values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
            query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
            return attend(query, keys, values, *self.found, layer.scaling).flatten(1)

    register_attention_backend("torch_native")(BatchedDecoding)


def cache_entries(
    table: torch.Tensor, requests: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Where the cache has the tokens of each request, and which of these count: int and bool, [batch, longest].

    None where padding would outweigh the tokens (`MOST_PADDING`).

    Args:
        table: int [requests there can be, longest context]: SGLang's table of all requests.
        requests: int [batch], rows of it.
        lengths: int [batch], tokens of each, the new one included.
    """
    longest, used = int(lengths.max()), int(lengths.sum())
    if len(requests) * longest > (1 + MOST_PADDING) * used:
        return None
    is_used = torch.arange(longest) < lengths[:, None]
    # What the table has behind a request's end is stale; entry 0 is SGLang's own for padding.
    return torch.where(is_used, table[requests, :longest], 0), is_used


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: torch.Tensor,
    is_used: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one new token a request to all of its tokens: [batch, heads, head size].

    Args:
        query: [batch, heads, head size].
        keys, values: [entries of the cache, heads of keys, head size].
        entries, is_used: Of `cache_entries`.
    """
    batch, heads, size = query.shape
    groups = keys.shape[1]
    shape = (*entries.shape, groups, size)
    key, value = (
        cache.index_select(0, entries.flatten()).view(shape).transpose(1, 2).to(query.dtype)
        for cache in (keys, values)
    )
    # The heads that share keys are the rows of one query, so that nothing is repeated for them.
    rows = query.view(batch, groups, heads // groups, size)
    output = scaled_dot_product_attention(rows, key, value, attn_mask=is_used[:, None, None, :], scale=scale)
    return output.reshape(batch, heads, size)
