"""Weights in pieces of bounded size, so that nobody holds more than a few of them at a time. Pure."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

NamedTensor = tuple[str, Tensor]

_SAMPLED_BYTES = 256  # at both ends and in the middle of a tensor


@dataclass(frozen=True)
class Piece:
    """Where a tensor lies in a flat buffer of bytes."""

    name: str
    dtype: str  # as in `torch.<dtype>`
    shape: tuple[int, ...]
    start: int
    end: int

    def of(self, buffer: Tensor) -> Tensor:
        """The tensor, as a view of the buffer (uint8, flat)."""
        return buffer[self.start : self.end].view(getattr(torch, self.dtype)).view(self.shape)


def in_buckets(tensors: Iterable[NamedTensor], size: int) -> Iterator[list[NamedTensor]]:
    """The tensors in their order, in buckets of at most `size` bytes and of one type; a larger tensor is one alone."""
    bucket: list[NamedTensor] = []
    held = 0
    for name, tensor in tensors:
        if bucket and (held + tensor.nbytes > size or tensor.dtype != bucket[0][1].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += tensor.nbytes
    if bucket:
        yield bucket


def lay_out(bucket: Sequence[NamedTensor], start: int = 0) -> tuple[Piece, ...]:
    """The tensors one after the other, from byte `start` on."""
    pieces = []
    for name, tensor in bucket:
        end = start + tensor.nbytes
        pieces.append(Piece(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start, end))
        start = end
    return tuple(pieces)


def write(bucket: Sequence[NamedTensor], pieces: Sequence[Piece], buffer: Tensor) -> None:
    """Copy the tensors, from whichever device, to their places."""
    for (_, tensor), piece in zip(bucket, pieces, strict=True):
        piece.of(buffer).copy_(tensor)


def sample_digest(piece: Piece, buffer: Tensor) -> int:
    """A checksum of a few bytes of a tensor: enough to see one that is not the one that was meant."""
    data = buffer[piece.start : piece.end].numpy()
    middle = len(data) // 2
    parts = (data[:_SAMPLED_BYTES], data[middle : middle + _SAMPLED_BYTES], data[-_SAMPLED_BYTES:])
    digest = 0
    for part in parts:
        digest = zlib.crc32(part.tobytes(), digest)
    return digest


def to_json(pieces: Sequence[Piece], digests: Sequence[int], **fields: object) -> str:
    """Pieces and digests as text."""
    return json.dumps({"pieces": [asdict(piece) for piece in pieces], "digests": list(digests), **fields})


def from_json(text: str) -> tuple[list[Piece], list[int], dict[str, object]]:
    """The inverse of `to_json`."""
    fields = json.loads(text)
    pieces = [Piece(**{**piece, "shape": tuple(piece["shape"])}) for piece in fields.pop("pieces")]
    return pieces, fields.pop("digests"), fields
