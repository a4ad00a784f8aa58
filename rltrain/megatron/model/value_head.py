"""A critic's model: the policy's layers with one number a token in place of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rltrain.arguments.config import Config
from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.device import device
from rltrain.megatron.model.build import build_model

_STD = 0.02  # of the head's first weights, as slime's


class ValueHead(torch.nn.Linear):
    """A linear layer to one output, the same on every tensor parallel rank; called as an output layer is."""

    def __init__(self, config: TransformerConfig, seed: int) -> None:
        """Its first weights come from `seed`, and leave all other random numbers unchanged."""
        super().__init__(config.hidden_size, 1, device="cpu", dtype=config.params_dtype)
        self._sequence_parallel = config.sequence_parallel
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * _STD)
            self.bias.zero_()
        for parameter in self.parameters():
            # With sequence parallelism each rank sees other tokens, so Megatron-core sums the gradients.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Values, [tokens, 1, 1] in fp32, of all tensor parallel ranks' tokens; and no bias."""
        values = super().forward(hidden).float()
        if self._sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None


def build_critic(shape: ModelShape, config: Config) -> list[GPTModel]:
    """This rank's chunks of a model of the policy's shape, with a value head on the last pipeline stage."""
    models = build_model(replace(shape, tied_embeddings=False, head=None), config)
    for model in models:
        if model.post_process:
            model.output_layer = ValueHead(model.config, config.optimizer.seed).to(device())
    return models


@torch.no_grad()
def copy_layers(source: Sequence[torch.nn.Module], target: Sequence[torch.nn.Module]) -> None:
    """Give a critic the policy's weights, except the output layer's."""
    for policy, critic in zip(source, target, strict=True):
        weights = dict(policy.named_parameters())
        for name, weight in critic.named_parameters():
            if not name.startswith("output_layer."):
                weight.copy_(weights[name])
