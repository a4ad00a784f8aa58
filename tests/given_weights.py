"""What a push needs outside of a job: tensors in the place of a trainer's model, and a real engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.weights.buckets import Part, in_buckets
from rltrain.weights.hf_directory import write_hf_directory


@dataclass(frozen=True)
class GivenWeights:
    """What `rltrain.megatron.exporter.Exporter` offers, of one rank."""

    tensors: Callable[[], Iterable[tuple[str, Tensor]]]
    template: Path

    def stream(self, consume: Callable[[Iterable[tuple[str, Tensor]]], object]) -> None:
        consume(self.tensors())

    def share(self, bucket_bytes: int, *, one_per_machine: bool) -> Iterator[Sequence[tuple[str, Tensor]]]:
        parts = (Part.whole(name, tensor) for name, tensor in self.tensors())
        return ([(part.name, part.data) for part in bucket] for bucket in in_buckets(parts, bucket_bytes))

    def write(self, directory: Path) -> None:
        write_hf_directory(directory, self.tensors(), self.template)


class GivenEngine(HttpServerEngineAdapter):
    """One of the fleet, as the trainer sees it, that may not fail."""

    is_here = True

    def has_died(self) -> bool:
        return False

    def expel(self, reason: str) -> None:
        raise AssertionError(reason)
