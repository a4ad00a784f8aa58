"""Other weights for the same model: of the reference policy, a teacher, or the policy as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rltrain.megatron.model.load import expert_biases


class SavedWeights:
    """A copy of a model's weights (its chunks on this rank) on the CPU, which takes their place for a forward pass."""

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        """Copy the present weights."""
        self._weights = [weight.detach().to("cpu", copy=True) for weight in _parameters(models)]

    @torch.no_grad()
    def take(self, models: Sequence[torch.nn.Module]) -> None:
        """Become a copy of the model's present weights."""
        for weight, kept in zip(_parameters(models), self._weights, strict=True):
            kept.copy_(weight)

    @torch.no_grad()
    def give(self, models: Sequence[torch.nn.Module]) -> None:
        """Copy them into the model."""
        for weight, kept in zip(_parameters(models), self._weights, strict=True):
            weight.copy_(kept)

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


class PastPolicies:
    """The policy as the engines got it, for --keep-old-actor: the last few versions, on the CPU.

    A version is the number of rollouts that the weights were trained on.
    """

    def __init__(self, staleness: int) -> None:
        """Args: staleness: how many rollouts generation may run ahead of training; 0 for none."""
        self._staleness = staleness
        self._versions: dict[int, SavedWeights] = {}

    def remember(self, version: int, models: Sequence[torch.nn.Module]) -> None:
        """The engines get the model's present weights; what no rollout will need any more is overwritten."""
        if version in self._versions:
            self._versions[version].take(models)
        elif len(self._versions) <= self._staleness:
            self._versions[version] = SavedWeights(models)
        else:
            weights = self._versions.pop(min(self._versions))
            weights.take(models)
            self._versions[version] = weights

    def that_generated(self, rollout_id: int) -> SavedWeights | None:
        """The newest weights that were there when a rollout began, else the oldest known; None before any."""
        known = sorted(self._versions)
        if not known:
            return None
        began = [version for version in known if version <= rollout_id - self._staleness]
        return self._versions[began[-1] if began else known[0]]


def _parameters(models: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    return [
        weight
        for model in models
        for weight in (*model.parameters(), *(bias for _, bias in expert_biases(model)))
    ]
