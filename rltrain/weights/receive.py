"""Runs inside an SGLang engine: loads weights out of the trainer's shared memory.

SGLang calls it because it is one of the engine's `--custom-weight-loader` (`rltrain.sglang.adapter`). What comes over
HTTP is only where the tensors lie. The memory begins with a place for every reader to report in: an exception in a
loader would end the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltrain.weights.buckets import Piece, from_json, sample_digest

REPORT_BYTES = 512  # for each reader
LOADED = "loaded"


def load_shared_memory(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Load one bucket; the name of the only entry is `buckets.to_json` of it, and its tensor is empty.

    Reports `LOADED`, or what went wrong. Nothing where the memory can't be read: it is another machine's.
    """
    ((text, _),) = named_tensors
    pieces, digests, fields = from_json(text)
    if not pieces:
        return
    path = Path(str(fields["path"]))
    # On another machine the same path may be any file: look before touching it.
    if not path.is_symlink() or str(fields["name"]) not in path.readlink().name:
        return
    buffer = _mapped(str(path), int(str(fields["size"])))
    report = _load(model, pieces, digests, buffer).encode()[:REPORT_BYTES]
    start = REPORT_BYTES * int(str(fields["reader"]))
    buffer[start : start + len(report)] = torch.frombuffer(bytearray(report), dtype=torch.uint8)


def read_report(buffer: Tensor, reader: int) -> str:
    """What a reader has reported; empty if nothing."""
    return (
        bytes(buffer[REPORT_BYTES * reader : REPORT_BYTES * (reader + 1)].numpy())
        .rstrip(b"\0")
        .decode(errors="replace")
    )


def _load(model: Any, pieces: Sequence[Piece], digests: Sequence[int], buffer: Tensor) -> str:
    for piece, digest in zip(pieces, digests, strict=True):
        if sample_digest(piece, buffer) != digest:
            return f"{piece.name} has another checksum than the trainer's"
    try:
        model.load_weights([(piece.name, piece.of(buffer)) for piece in pieces])
    except Exception as error:
        return f"{pieces[0].name} to {pieces[-1].name} can't be loaded: {type(error).__name__}: {error}"
    return LOADED


@lru_cache(maxsize=2)
def _mapped(path: str, size: int) -> Tensor:
    """The trainer's memory; mapped once, as it is used again and again."""
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
