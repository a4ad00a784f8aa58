"""Layers' parts for fp32 on a CPU against the compositions of torch's operations that they stand for, gradients too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rltrain.megatron import cpu
from rltrain.megatron.model.layers import cpu_kernels

TOKENS, HEADS, SIZE = 7, 3, 10


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The function's result, and the gradients of its inputs where those of the result are no constant."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    result = function(*leaves)
    (result * torch.linspace(-1, 2, result.numel()).view_as(result)).sum().backward()
    return [result.detach(), *(each.grad for each in leaves if each.grad is not None)]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    size = angles.shape[-1]
    first, second = x[..., :size].chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return torch.cat([x[..., :size] * angles.cos() + turned * angles.sin(), x[..., size:]], dim=-1)


@pytest.mark.parametrize("rotated_size", [SIZE, SIZE - 4])
def test_a_rotary_embedding_is_that_of_the_paper(rotated_size: int) -> None:
    angles = numbers(TOKENS, 1, rotated_size // 2).repeat(1, 1, 2)
    whole = numbers(TOKENS, HEADS, 2 * SIZE)
    # A part of a larger tensor, as in a layer, and a whole one.
    for x in (whole[..., :SIZE], numbers(TOKENS, HEADS, SIZE)):
        ours = with_gradients(lambda x: cpu_kernels.rotate(x, angles), x)
        torch.testing.assert_close(ours, with_gradients(lambda x: rotated(x, angles), x))


@pytest.mark.parametrize("shape", [(TOKENS, 1, SIZE), (TOKENS, HEADS, SIZE), (0, 1, SIZE)])
def test_a_norm_is_torchs(shape: tuple[int, ...]) -> None:
    x, weight = numbers(*shape), numbers(SIZE)
    ours = with_gradients(lambda x, weight: cpu_kernels.rms_norm(x, weight, 1e-5), x, weight)
    torch.testing.assert_close(
        ours, with_gradients(lambda x, weight: F.rms_norm(x, (SIZE,), weight, 1e-5), x, weight)
    )


def test_a_norm_of_frozen_weights_and_of_frozen_inputs_has_the_gradients_that_are_asked_for() -> None:
    x, weight = numbers(TOKENS, SIZE), numbers(SIZE)
    whole = with_gradients(lambda x, weight: cpu_kernels.rms_norm(x, weight, 1e-5), x, weight)
    of_x = with_gradients(lambda x: cpu_kernels.rms_norm(x, weight, 1e-5), x)
    of_weight = with_gradients(lambda weight: cpu_kernels.rms_norm(x, weight, 1e-5), weight)
    torch.testing.assert_close([of_x[1], of_weight[1]], whole[1:])


def test_a_gated_activation_is_that_of_the_paper() -> None:
    x = numbers(TOKENS, 1, 2 * SIZE)

    def plain(x: Tensor) -> Tensor:
        gate, linear = x.chunk(2, dim=-1)
        return F.silu(gate) * linear

    torch.testing.assert_close(with_gradients(cpu_kernels.swiglu, x), with_gradients(plain, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weights_gradient_is_added_to_what_is_there(dtype: torch.dtype) -> None:
    inputs, gradient = numbers(TOKENS, SIZE).to(dtype), numbers(TOKENS, 2 * SIZE).to(dtype)
    total = torch.ones(2 * SIZE, SIZE)
    cpu.WeightGradients.wgrad_gemm_accum_fp32(inputs, gradient, total)
    torch.testing.assert_close(total, 1 + (gradient.t() @ inputs).float())
