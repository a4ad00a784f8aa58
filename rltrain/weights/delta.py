"""Only what has changed: the elements of a tensor that differ from what was sent before, and where they are.

After an optimizer step with the learning rates of reinforcement learning, about one in a hundred bf16 weights has
another value, anywhere in its tensor. So changes are sent by element: its value, and in one byte its distance from the
element before. Where that is more than 255, an unchanged element in between is sent too. New values replace the old, so
sending them twice does no harm, and the result is bit for bit what sending everything would have given.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rltrain.weights.buckets import NamedTensor, Part, Piece
from rltrain.weights.engine import ServerEngine

_MOST = 255  # a gap in one byte
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sent:
    """What the engines hold: every tensor as it was sent last, in host memory."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def whole(self, tensors: Iterable[NamedTensor]) -> Iterator[Part]:
        """All of them, to be remembered as sent."""
        for name, tensor in tensors:
            self._tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
            yield Part.whole(name, tensor)

    def changes(self, tensors: Iterable[NamedTensor]) -> Iterator[Part]:
        """Those that have changed since they were sent, by element or, where that is not less, whole."""
        for name, tensor in tensors:
            before = self._tensors[name]
            part = change(name, before.to(tensor.device), tensor.contiguous())
            if part is not None:
                before.copy_(tensor)
                yield part


class DeltaState:
    """What this rank has sent, and which engines have all of it.

    Attributes:
        keep: the name under which engines keep what they get.
    """

    def __init__(self) -> None:
        self.keep = f"slurmlime-weights-{uuid.uuid4().hex}"
        self._sent = Sent()
        self._version: int | None = None  # of what was sent last
        self._known: set[str] = set()  # URLs of engines that have it

    def begin(self, version: int, engines: Sequence[ServerEngine]) -> bool:
        """Begin a push; returns whether one of these engines, and so all, must be sent everything."""
        is_enough = all(engine.url in self._known for engine in engines)
        if version != self._version:
            self._known = set()  # if this push fails half-way, no engine has all of it
        elif not is_enough:
            self._known -= {engine.url for engine in engines}
        return not is_enough

    def parts(self, tensors: Iterable[NamedTensor], everything: bool) -> Iterator[Part]:
        """What to send of these tensors."""
        return self._sent.whole(tensors) if everything else self._sent.changes(tensors)

    def end(self, version: int, engines: Sequence[ServerEngine], failures: dict[str, str]) -> None:
        """These engines have got it, except the failed ones."""
        self._version = version
        self._known = (self._known | {engine.url for engine in engines}) - failures.keys()

    def forget(self) -> None:
        """No engine has it any more."""
        self._known.clear()


def change(name: str, before: Tensor, after: Tensor) -> Part | None:
    """What turns one contiguous tensor into another of its shape and type; None if they are bit for bit the same."""
    places = _differing(_as_integers(before), _as_integers(after))
    if not len(places):
        return None
    whole = Part.whole(name, after)
    if len(places) * (after.element_size() + 1) >= after.nbytes:
        return whole
    gaps = _gaps(places)
    size = len(gaps) * (after.element_size() + 1)
    if size >= after.nbytes:
        return whole
    values = after.flatten()[gaps.cumsum(0) - 1]
    data = torch.cat([values.view(torch.uint8), gaps.to(torch.uint8)])
    return Part(name, data, whole.dtype, whole.shape, changed=len(gaps))


def apply(piece: Piece, buffer: Tensor, target: Tensor) -> None:
    """Make the changes that lie in `buffer`, on whichever device, to a contiguous tensor in host memory."""
    assert piece.changed is not None, "it is a whole tensor"
    data = piece.bytes_of(buffer).cpu()
    values = data[: piece.changed * target.element_size()].view(target.dtype)
    places = data[-piece.changed :].long().cumsum(0) - 1
    target.view(-1)[places] = values


def _differing(before: Tensor, after: Tensor) -> Tensor:
    """Places at which two flat tensors differ, ascending."""
    if before.is_cpu:  # three times as fast as torch
        return torch.from_numpy(np.flatnonzero(before.numpy() != after.numpy()))
    return torch.nonzero(before != after).flatten()


def _gaps(places: Tensor) -> Tensor:
    """Distances (1 to 255) between ascending places, from -1 on, with as many in between as that takes."""
    gaps = torch.diff(places, prepend=places.new_tensor([-1]))
    far = torch.nonzero(gaps > _MOST).flatten()
    if not len(far):
        return gaps
    more = torch.zeros_like(gaps)
    more[far] = (gaps[far] - 1) // _MOST
    ends = (more + 1).cumsum(0) - 1
    filled = gaps.new_full((int(ends[-1]) + 1,), _MOST)
    filled[ends] = gaps - more * _MOST
    return filled


def _as_integers(tensor: Tensor) -> Tensor:
    """Bits, flat: -0.0 is not 0.0, and NaN is itself."""
    return tensor.flatten().view(_INTEGERS[tensor.element_size()])
