"""The reference policy: a copy of weights on the CPU that takes the model's place for a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ReferenceWeights:
    """Weights as they were when this was created."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._weights: dict[str, Tensor] = {
            name: weight.detach().to("cpu", copy=True) for name, weight in model.named_parameters()
        }

    @contextmanager
    def in_place_of(self, model: torch.nn.Module) -> Iterator[None]:
        """While entered, the model computes with these weights; its own are untouched and come back."""
        own = {name: weight.data for name, weight in model.named_parameters()}
        try:
            for name, weight in model.named_parameters():
                weight.data = self._weights[name].to(weight.device)
            yield
        finally:
            for name, weight in model.named_parameters():
                weight.data = own[name]
