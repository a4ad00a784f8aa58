"""Seeded sampling for SGLang on the CPU, so that a run can be repeated token for token.

SGLang honours a request's `sampling_seed` only with `enable_deterministic_inference`, which it offers with
CUDA kernels. For the `torch_native` backend only the seeded sampler matters: this admits the backend, leaves
out the batch-invariant Triton kernels, and gives in torch the hash that the sampler takes from sgl_kernel.
"""

from __future__ import annotations

import functools

import torch

_MASK = 0xFFFFFFFF


def allow_deterministic_sampling() -> None:
    """Make `enable_deterministic_inference` work with `attention_backend="torch_native"`; idempotent."""
    from sglang.srt import batch_invariant_ops
    from sglang.srt.server_args import add_deterministic_attention_backend_choices

    add_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda *args, **kwargs: None
    _register_hash()


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bit) of (seed, position, column): uint32 of shape [len(seed), len(columns)].

    `seed` (64 bits) and `positions` have one entry a request; `columns` are token ids.
    """
    seed = seed.view(torch.int64)
    state = torch.zeros_like(seed)
    for word in (seed & _MASK, (seed >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        state = _mix(state, word)
    state = _mix(state[:, None], (columns.to(torch.int64) & _MASK)[None, :]) ^ 16  # 16 bytes were hashed
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _MASK
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _MASK
    return (state ^ (state >> 16)).to(torch.uint32)


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = (word * 0xCC9E2D51) & _MASK
    word = ((word << 15) | (word >> 17)) & _MASK
    state = state ^ ((word * 0x1B873593) & _MASK)
    state = ((state << 13) | (state >> 19)) & _MASK
    return (state * 5 + 0xE6546B64) & _MASK


@functools.cache
def _register_hash() -> torch.library.Library:
    """Returned (and so kept by the cache): the operator lives as long as its library object."""
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CompositeExplicitAutograd")

    @torch.library.register_fake("sgl_kernel::murmur_hash32_cpu", lib=library)
    def _(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
        return torch.empty((seed.shape[0], col_indices.shape[0]), dtype=torch.uint32)

    return library
