"""The trainer's weights as engines and Hugging Face directories get them.

Quantised, where the model is; and directories with what is not trained.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.model.export import export_even_share, export_hf_weights, export_own_share
from rltrain.megatron.model.load import extra_heads, local_parameters
from rltrain.megatron.model.tensor_files import SafetensorsDirectory
from rltrain.megatron.quantise import BlockFp8
from rltrain.megatron.ranks import control_group, on_rank_0, together
from rltrain.models.quantised import fp8_block
from rltrain.run.files import read_object
from rltrain.weights.buckets import NamedTensor, Part
from rltrain.weights.transports import hf_directory


class Exporter:
    """Methods are called by all ranks together."""

    def __init__(self, models: list[GPTModel], shape: ModelShape, template: Path) -> None:
        """Of a directory all but the weights is copied from the model directory `template`.

        If that has quantised weights, so has everything that is exported.
        """
        self._models, self._shape, self._template = models, shape, template
        self._form = _quantised_form(template)

    def stream(self, consume: Callable[[Iterable[NamedTensor]], object]) -> None:
        """Bring the weights to rank 0 bucket by bucket; it consumes them, the others take part."""
        tensors = self._formed(export_hf_weights(self._models, self._shape))
        if dist.get_rank() == 0:
            consume(tensors)
        for _ in tensors:  # to the end, even if they are not wanted: other ranks are sending
            pass

    def share(self, bucket_bytes: int, *, one_per_machine: bool, cut: bool = False) -> Iterator[list[Part]]:
        """This rank's share of the weights, in rounds that all ranks go through (see `export_own_share`).

        With `one_per_machine` only the first rank of each has one, and the first of those that alone hold a weight;
        with `cut` they also share tensors (see `export_even_share`).
        """
        takers = _first_of_machines() if one_per_machine else None
        if takers is None or not cut:
            for named in export_own_share(self._models, self._shape, bucket_bytes, takers):
                yield [Part.whole(*each) for each in self._formed(named)]
            return
        for windows in export_even_share(self._models, self._shape, bucket_bytes, takers):
            found = [Part.cut(*each, window) for window, named in windows for each in self._formed(named)]
            yield [part for part in found if part is not None]

    def write(self, directory: Path) -> None:
        """Write the weights as a Hugging Face directory, every rank its share; done when this returns.

        Layers of the template that predict further tokens, and its indexers, are kept as they are.

        Raises:
            OSError: it can't be written, on every rank; what was there under its name is untouched.
        """

        def failure(problem: str) -> OSError:
            return hf_directory.give_up(directory, problem)

        temporary = Path(on_rank_0(lambda: str(hf_directory.begin(directory))))
        trained = head_names(self._models, self._shape)
        tensors = self._formed(chain.from_iterable(export_own_share(self._models, self._shape)))
        if dist.get_rank() == 0:
            tensors = chain(tensors, kept_heads(self._template, self._shape, trained))
        written = together(lambda: _write(temporary, tensors), failure)
        everything: list[hf_directory.Written | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everything, written, group=control_group())
        complete = [each for each in everything if each is not None]
        is_first = dist.get_rank() == 0
        together(
            lambda: hf_directory.finish(directory, complete, self._template) if is_first else None, failure
        )

    def _formed(self, tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        return iter(tensors) if self._form is None else self._form.quantised(tensors)


def _quantised_form(template: Path) -> BlockFp8 | None:
    """What the directory's weights are quantised to; None if they are not."""
    block = fp8_block(read_object(template / "config.json"))
    return BlockFp8.of(block, SafetensorsDirectory(template).names) if block else None


def head_names(models: list[GPTModel], shape: ModelShape) -> set[str]:
    """The tensors of a head for one token more that is trained. All ranks call it together, and all know them."""
    if shape.head is None:
        return set()
    own = [each for each in local_parameters(models, shape) if each.is_head]
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    mine = [name for each in own for name in each.entry.hf_names]
    dist.all_gather_object(everyone, mine, group=control_group())
    return {name for names in everyone for name in names}


def kept_heads(template: Path, shape: ModelShape, trained: Collection[str] = ()) -> Iterator[NamedTensor]:
    """What is not trained (see `extra_heads`), as it is in the model directory; nothing, if that has no weights.

    Args:
        trained: Of those names the ones that the model has, see `head_names`.
    """
    if not shape.family.extra_heads or not any(template.glob("model*.safetensors")):
        return
    source = SafetensorsDirectory(template)
    for name in extra_heads(source.names, shape):
        if name not in trained:
            yield name, source.tensor(name, None, of_any_type=True)[:]


def _first_of_machines() -> set[int]:
    """The first rank of each machine."""
    # Two nodes of a sandbox are one machine.
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, name, group=control_group())
    # Of those with the same name the first is left.
    return set({name: rank for rank, name in reversed([*enumerate(names)])}.values())


def _write(temporary: Path, tensors: Iterable[NamedTensor]) -> hf_directory.Written:
    try:
        return hf_directory.write_weights(temporary, tensors, writer=dist.get_rank())
    finally:
        for _ in tensors:  # to the end, also if the disk is full: other ranks gather with this one
            pass
