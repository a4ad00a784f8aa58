"""Lets tokens reach their experts on a machine without CUDA: repairs of Megatron-core 0.16's dispatchers.

gloo gathers only parts of equal size, and Megatron-core brings split sizes to the CPU only if they are not there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def replace_dispatching() -> None:
    """Replace what cannot work on the CPU. Calling it again changes nothing."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if hasattr(mappings, "_slurmlime_fixed"):
        return
    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # asked for by name, also where there is no TransformerEngine
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(
        own: Tensor, group: dist.ProcessGroup, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(own, group, output_split_sizes, use_global_buffer)
        most = max(1, *output_split_sizes)
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: own.shape[0]] = own
        parts = own.new_empty((group.size() * most, *own.shape[1:]))
        dist.all_gather_into_tensor(parts, padded, group=group)
        return torch.cat(
            [part[:size] for part, size in zip(parts.split(most), output_split_sizes, strict=True)]
        )

    def scatter_any(
        whole: Tensor,
        group: dist.ProcessGroup,
        input_split_sizes: Any = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter(whole, group, input_split_sizes, use_global_buffer)
        total = whole.clone()
        dist.all_reduce(total, group=group)
        return total.split(list(input_split_sizes))[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_any, scatter_any
    mappings._slurmlime_fixed = True


def _split_sizes(sizes: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The sizes as collectives take them; the original leaves tensors of the CPU as they are."""
    return sizes.numpy() if as_numpy and isinstance(sizes, Tensor) else sizes
