"""A real engine: waiting for it, how busy it is, what is left of it, and tensors in the place of a trainer's model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch import Tensor

from rltrain.run.http import call
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.weights.buckets import Part, in_buckets
from rltrain.weights.transports.hf_directory import write_hf_directory


def living(processes: list[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Those that have not ended in time. A zombie has: where pid 1 does not reap orphans, it stays one."""
    _, rest = psutil.wait_procs(processes, timeout=timeout)
    now = psutil.process_iter(["status"])
    return [each for each in now if each in rest and each.info["status"] != psutil.STATUS_ZOMBIE]


def load_weights(engine: HttpServerEngineAdapter, path: Path, version: str) -> None:
    """Paused meanwhile: SGLang may still hold the batch of an answer that has just arrived."""
    engine.pause_generation()
    engine.update_weights_from_disk(path, version)
    engine.continue_generation()


def running_requests(url: str, token: str) -> int:
    loads = call("GET", f"{url}/v1/loads", token)["loads"]
    return sum(load["num_running_reqs"] for load in loads)


@dataclass(frozen=True)
class GivenWeights:
    """What `rltrain.megatron.exporter.Exporter` offers, of one rank."""

    tensors: Callable[[], Iterable[tuple[str, Tensor]]]
    template: Path

    def stream(self, consume: Callable[[Iterable[tuple[str, Tensor]]], object]) -> None:
        consume(self.tensors())

    def share(
        self, bucket_bytes: int, *, one_per_machine: bool, cut: bool = False
    ) -> Iterator[Sequence[Part]]:
        return in_buckets((Part.whole(name, tensor) for name, tensor in self.tensors()), bucket_bytes)

    def write(self, directory: Path) -> None:
        write_hf_directory(directory, self.tensors(), self.template)


class GivenEngine(HttpServerEngineAdapter):
    """One of the fleet, as the trainer sees it, that may not fail."""

    is_here = True

    def has_died(self) -> bool:
        return False

    def expel(self, reason: str) -> None:
        raise AssertionError(reason)
