"""Activations of MLPs that torch has no function of one argument for."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """tanh's approximation of GELU."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """An approximation of GELU by a sigmoid; Megatron-core's own would be compiled."""
    return x * torch.sigmoid(1.702 * x)
