"""Which tensors of a Hugging Face checkpoint a parameter of Megatron-core holds, and how they lie in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal[
    "plain", "qkv", "fused_qkv", "gated_qkv", "stacked", "halves", "vocab", "woven", "transposed", "delta",
    "delta_by_head", "delta_convolution",
]  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """Where one Megatron-core parameter comes from.

    Attributes:
        hf_names: The Hugging Face tensors that it holds.
        layout: `plain`: one tensor. `qkv`: query, key and value rows interleaved by key-value group.
            `fused_qkv`: the same of one tensor, that has all query rows, all key rows, all value rows.
            `gated_qkv`: as `qkv`, and the rows of each query are followed by those of its gate; here the gates of a
            group follow its queries.
            `delta`: the first projection of a gated delta net, interleaved by key head: of four tensors, the first of
            which has all query rows, all key rows, all value rows. `delta_by_head`: of two tensors with such rows.
            `delta_convolution`: the same of one tensor with query, key and value rows.
            `stacked`: tensors below one another. `halves`: the same, but Hugging Face has them as one tensor,
            of which a rank holds a share of each half. `vocab`: one tensor; rows of zeros pad it to what the
            ranks hold together, so that the last ranks may hold fewer of its rows than others, or none.
            `transposed`: one tensor, the other way round. `woven`: the same, and its columns are those of gate and up
            in turn; also a bias of such.
        split_dim: The dimension that tensor parallelism splits in the Hugging Face tensors; None: replicated.
        is_expert: Held by the ranks of its expert alone, and split by expert tensor parallelism.
        of_all_experts: The tensor has those of all experts, one after the other. Expert tensor parallelism can't
            split it.
        expert: Which one of them this is.
    """

    hf_names: tuple[str, ...]
    layout: Layout = "plain"
    split_dim: int | None = None
    is_expert: bool = False
    of_all_experts: bool = False
    expert: int = 0
