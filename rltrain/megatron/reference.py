"""The reference policy: a copy of weights on the CPU that takes the model's place for a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class ReferenceWeights:
    """Weights as they were when this was created, of all chunks of a model on this rank."""

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._weights: list[Tensor] = [weight.detach().to("cpu", copy=True) for weight in _parameters(models)]

    @contextmanager
    def in_place_of(self, models: Sequence[torch.nn.Module]) -> Iterator[None]:
        """While entered, the model computes with these weights; its own are untouched and come back."""
        own = [weight.data for weight in _parameters(models)]
        try:
            for weight, kept in zip(_parameters(models), self._weights, strict=True):
                weight.data = kept.to(weight.device)
            yield
        finally:
            for weight, data in zip(_parameters(models), own, strict=True):
                weight.data = data


def _parameters(models: Sequence[torch.nn.Module]) -> list[torch.nn.Parameter]:
    return [weight for model in models for weight in model.parameters()]
