"""Norms, rotary embeddings and gated activations with gradients written out, for fp32 on a CPU.

As compositions of torch's operations each reads and writes its tensors a dozen times, and keeps several of them for
the backward pass. These keep their input, compute the rest again, and pass over memory a few times. The formulas are
the same; results differ by rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def has_kernels(x: Tensor) -> bool:
    """Whether the functions of this module are for such a tensor."""
    return x.is_cpu and x.dtype == torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (https://arxiv.org/abs/1910.07467) of the last dimension, times `weight` of its size."""
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding (https://arxiv.org/abs/2104.09864) of the first half's numbers with those of the second.

    Args:
        x: [tokens, heads, size].
        angles: Of each token, [tokens, 1, rotated size], the same for both halves; numbers of `x` after these stay.
    """
    rotated: Tensor = _Rotate.apply(x, angles.cos(), angles.sin())
    return rotated


def swiglu(x: Tensor) -> Tensor:
    """SiLU of the first half of the last dimension, times the second (https://arxiv.org/abs/2002.05202)."""
    gated: Tensor = _SwiGLU.apply(x)
    return gated


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = torch.mul(x, scale)
        product = torch.mul(gradient, normed)
        of_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        along = torch.matmul(product, weight).unsqueeze(-1).mul_(scale).div_(-x.shape[-1])
        of_x = torch.mul(gradient, weight, out=product).mul_(scale).addcmul_(normed, along)
        return of_x, of_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    size = cos.shape[-1]
    half = size // 2
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    result[..., size:] = x[..., size:]
    torch.mul(x[..., :size], cos, out=result[..., :size])
    result[..., :half].addcmul_(x[..., half:size], sin[..., :half], value=-direction)
    result[..., half:size].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, linear = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(linear)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, linear = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        of_gate, of_linear = result.chunk(2, dim=-1)
        kept = F.silu(gate)
        torch.mul(gradient, kept, out=of_linear)
        torch.mul(gradient, linear, out=kept)
        torch.ops.aten.silu_backward.grad_input(kept, gate, grad_input=of_gate)
        return result
