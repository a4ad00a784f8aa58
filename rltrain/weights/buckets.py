"""Weights in buckets of bounded size, so that nobody holds more than a few of them at a time. Pure."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

NamedTensor = tuple[str, Tensor]

_ALIGNMENT = 16  # bytes; of any type, and of what copies fast
_SAMPLED_BYTES = 256  # at both ends and in the middle of a tensor
_APART_BYTES = 2 * 1024**2  # copying fewer costs less than a message


@dataclass(frozen=True)
class Window:
    """Some of the elements of a flat tensor, of any size: those from `start` to `end`, where all of them are `of`.

    Windows that follow one another cut every tensor into parts without a gap.
    """

    start: int
    end: int
    of: int


@dataclass(frozen=True)
class Part:
    """What is sent of one tensor.

    Attributes:
        data: the tensor; or, where only `changed` of its elements are sent, their values and places (uint8, flat;
            see `rltrain.weights.delta`); or some of its elements (flat).
        dtype: of the tensor, as in `torch.<dtype>`.
        first: place of the first of those elements in the flat tensor; None of a whole one.
    """

    name: str
    data: Tensor
    dtype: str
    shape: tuple[int, ...]
    changed: int | None = None
    first: int | None = None

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Part:
        """All of a tensor."""
        return cls(name, tensor, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @classmethod
    def cut(cls, name: str, tensor: Tensor, window: Window) -> Part | None:
        """What lies in the window; None if that is nothing."""
        first, last = (tensor.numel() * edge // window.of for edge in (window.start, window.end))
        whole = cls.whole(name, tensor)
        if last - first == tensor.numel():
            return whole
        return replace(whole, data=tensor.flatten()[first:last], first=first) if first < last else None


@dataclass(frozen=True)
class Piece:
    """Where a `Part` lies in a flat buffer of bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    changed: int | None = None
    first: int | None = None

    def bytes_of(self, buffer: Tensor) -> Tensor:
        """Its bytes, as a view of the buffer (uint8, flat)."""
        return buffer[self.start : self.end]

    def of(self, buffer: Tensor) -> Tensor:
        """The tensor, or its elements that are here (flat), as a view of the buffer."""
        flat = self.bytes_of(buffer).view(getattr(torch, self.dtype))
        return flat.view(self.shape) if self.first is None else flat


@dataclass(frozen=True)
class Bucket:
    """What lies in a flat buffer of bytes.

    Attributes:
        digests: checksums of the pieces, see `sample_digests`.
        keep: name of the file in which the engines keep it, because changes to it will be sent; or None.
    """

    pieces: tuple[Piece, ...]
    digests: list[int]
    keep: str | None = None


@dataclass(frozen=True)
class Chunk:
    """What is sent at once of a bucket: bytes (uint8, flat), and at which byte of it they begin."""

    start: int
    data: Tensor


def in_buckets(parts: Iterable[Part], size: int) -> Iterator[list[Part]]:
    """The parts in their order, in buckets of about `size` bytes; a larger one is alone."""
    bucket: list[Part] = []
    held = 0
    for part in parts:
        if bucket and held + part.data.nbytes > size:
            yield bucket
            bucket, held = [], 0
        bucket.append(part)
        held += part.data.nbytes
    if bucket:
        yield bucket


def lay_out(bucket: Sequence[Part], start: int = 0) -> tuple[Piece, ...]:
    """The parts one after the other, from byte `start` on."""
    pieces = []
    for part in bucket:
        start = -(-start // _ALIGNMENT) * _ALIGNMENT
        end = start + part.data.nbytes
        pieces.append(Piece(part.name, part.dtype, part.shape, start, end, part.changed, part.first))
        start = end
    return tuple(pieces)


def write(bucket: Sequence[Part], pieces: Sequence[Piece], buffer: Tensor) -> None:
    """Copy the parts, from whichever device, to their places."""
    for part, piece in zip(bucket, pieces, strict=True):
        target = piece.bytes_of(buffer) if part.changed is not None else piece.of(buffer)
        target.copy_(part.data)


def pack(bucket: Sequence[Part], pieces: Sequence[Piece], buffer: Tensor) -> tuple[list[Chunk], list[int]]:
    """As `write`, but large tensors in host memory stay where they are: copying takes as long as sending.

    Args:
        buffer: in host memory.

    Returns:
        What to send, one after the other, and the checksums of the pieces. They are good as long as the parts do not
        change.
    """
    chunks: list[Chunk] = []
    digests: list[int] = []
    small: list[Piece] = []  # written, and in no chunk yet

    def close() -> None:
        if small:
            chunks.append(Chunk(small[0].start, buffer[small[0].start : small[-1].end]))
            small.clear()

    for part, piece in zip(bucket, pieces, strict=True):
        data = part.data.detach()
        if data.is_cpu and data.is_contiguous() and data.nbytes >= _APART_BYTES:
            close()
            chunks.append(Chunk(piece.start, data.flatten().view(torch.uint8)))
            digests.append(sample_digest(chunks[-1].data))
        else:
            write([part], [piece], buffer)
            small.append(piece)
            digests.append(sample_digest(piece.bytes_of(buffer)))
    close()
    return chunks, digests


def sample_digests(pieces: Sequence[Piece], buffer: Tensor) -> list[int]:
    """A checksum of a few bytes of each piece: enough to notice another tensor than the one that was meant."""
    if buffer.is_cpu:
        return [sample_digest(piece.bytes_of(buffer)) for piece in pieces]
    return _gathered_digests(pieces, buffer) if pieces else []


def sample_digest(data: Tensor) -> int:
    """The same of one tensor's bytes (uint8, flat) in host memory."""
    found = data.numpy()
    edges = (0, len(found) // 2, max(0, len(found) - _SAMPLED_BYTES))
    samples = (found[edge : edge + _SAMPLED_BYTES] for edge in edges)
    # A short one is filled up with its last byte.
    filled = (each.tobytes() + each[-1:].tobytes() * (_SAMPLED_BYTES - len(each)) for each in samples)
    return zlib.crc32(b"".join(filled))


def _gathered_digests(pieces: Sequence[Piece], buffer: Tensor) -> list[int]:
    """The same of all, with one gather: otherwise a GPU would be asked three times per tensor."""
    sizes = torch.tensor([piece.end - piece.start for piece in pieces])
    starts = torch.tensor([piece.start for piece in pieces])
    within = torch.arange(_SAMPLED_BYTES)
    places = torch.stack([torch.zeros_like(sizes), sizes // 2, (sizes - _SAMPLED_BYTES).clamp(min=0)], dim=1)
    places = (places[:, :, None] + within).flatten(1).minimum(sizes[:, None] - 1) + starts[:, None]
    samples = buffer[places.to(buffer.device)].cpu().numpy()
    return [zlib.crc32(sample.tobytes()) for sample in samples]


def to_json(bucket: Bucket, source: Mapping[str, Any]) -> str:
    """A bucket, and where its bytes are, as JSON; made once for all engines, as it can have thousands of pieces."""
    return json.dumps({**asdict(bucket), "source": source})


def message(buckets: str, place: int = 0) -> str:
    """What an engine is told of a round: all its buckets (JSON, see `to_json`, joined by commas), and its place.

    The text of the buckets is the same for all engines, so that this costs next to nothing with many of them.
    """
    return f'{{"place": {place}, "buckets": [{buckets}]}}'


def from_message(text: str) -> list[tuple[Bucket, dict[str, Any]]]:
    """The inverse of `message`: buckets and their sources, in the order in which this engine takes them."""
    told = json.loads(text)
    buckets = [_bucket_of(fields) for fields in told["buckets"]]
    return [buckets[number] for number in taken(told["place"], len(buckets))]


def taken(place: int, count: int) -> list[int]:
    """Numbers of the senders, of `count`, in the order in which the engine at this place takes their buckets.

    Each engine begins with another one, so all of them have work, and a sender has not all engines at once.
    """
    return [(place + i) % count for i in range(count)]


def _bucket_of(fields: Mapping[str, Any]) -> tuple[Bucket, dict[str, Any]]:
    pieces = tuple(Piece(**{**piece, "shape": tuple(piece["shape"])}) for piece in fields["pieces"])
    return Bucket(pieces, fields["digests"], fields["keep"]), fields["source"]
