"""Attention whose output is weighed by a gate."""

from __future__ import annotations

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class GatedSelfAttention(SelfAttention):
    """Megatron-core's, which would compile the gate: that needs a compiler on a CPU, and time everywhere."""

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return (x * gate.reshape(x.shape).float().sigmoid()).to(x.dtype)
