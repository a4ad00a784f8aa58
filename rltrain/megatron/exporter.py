"""The trainer's weights on their way out: as a stream to rank 0, or as a directory that all ranks write."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.agreement import together
from rltrain.megatron.distributed import control_group, on_rank_0
from rltrain.megatron.export_shares import export_own_share
from rltrain.megatron.hf_export import export_hf_weights
from rltrain.weights import hf_directory
from rltrain.weights.buckets import NamedTensor


class Exporter:
    """Methods are called by all ranks together."""

    def __init__(self, models: list[GPTModel], shape: ModelShape, template: Path) -> None:
        """Of a directory all but the weights is copied from the model directory `template`."""
        self._models, self._shape, self._template = models, shape, template

    def stream(self, consume: Callable[[Iterable[NamedTensor]], object]) -> None:
        """Bring the weights to rank 0 bucket by bucket; it consumes them, the others take part."""
        tensors = export_hf_weights(self._models, self._shape)
        if dist.get_rank() == 0:
            consume(tensors)
        for _ in tensors:  # to the end, also where nobody wants them: other ranks are sending
            pass

    def share(self, bucket_bytes: int, *, one_per_machine: bool) -> Iterator[Sequence[NamedTensor]]:
        """This rank's share of the weights, in rounds that all ranks go through (see `export_own_share`).

        With `one_per_machine` only the first rank of each has one, and the first of those that alone hold a weight.
        """
        takers = _first_of_machines() if one_per_machine else None
        return export_own_share(self._models, self._shape, bucket_bytes, takers)

    def write(self, directory: Path) -> None:
        """Write the weights as a Hugging Face directory, every rank its share; done when this returns.

        Raises:
            OSError: it can't be written, on every rank; what was there under its name is untouched.
        """

        def failure(problem: str) -> OSError:
            return hf_directory.give_up(directory, problem)

        temporary = Path(on_rank_0(lambda: str(hf_directory.begin(directory))))
        tensors = chain.from_iterable(export_own_share(self._models, self._shape))
        written = together(lambda: _write(temporary, tensors), failure)
        everything: list[hf_directory.Written | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everything, written, group=control_group())
        complete = [each for each in everything if each is not None]
        is_first = dist.get_rank() == 0
        together(
            lambda: hf_directory.finish(directory, complete, self._template) if is_first else None, failure
        )


def _first_of_machines() -> set[int]:
    """The first rank of each machine."""
    # Two nodes of a sandbox are one machine.
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, name, group=control_group())
    return {names.index(name) for name in names}


def _write(temporary: Path, tensors: Iterable[NamedTensor]) -> hf_directory.Written:
    try:
        return hf_directory.write_weights(temporary, tensors, writer=dist.get_rank())
    finally:
        for _ in tensors:  # to the end, also if the disk is full: other ranks gather with this one
            pass
