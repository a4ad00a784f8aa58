"""Tensors in the place of a trainer's model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rltrain.weights.hf_directory import write_hf_directory


@dataclass(frozen=True)
class GivenWeights:
    """What `rltrain.megatron.exporter.Exporter` offers, of one rank."""

    tensors: Callable[[], Iterable[tuple[str, Tensor]]]
    template: Path

    def stream(self, consume: Callable[[Iterable[tuple[str, Tensor]]], object]) -> None:
        consume(self.tensors())

    def write(self, directory: Path) -> None:
        write_hf_directory(directory, self.tensors(), self.template)
