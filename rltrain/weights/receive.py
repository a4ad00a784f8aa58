"""Runs inside an SGLang engine: loads weights that the trainer offers, and says whether they are those it meant.

SGLang calls it on every rank, because it is one of the engine's `--custom-weight-loader` (`rltrain.sglang.adapter`).
What comes over HTTP is only where to call the trainer, who then says bucket by bucket which tensors there are, their
checksums, and where to read them. Everything that goes wrong is reported there: an exception in a loader would end the
engine.
"""

from __future__ import annotations

import json
import logging
import socket
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltrain.weights.buckets import Bucket, Piece, from_json, sample_digests
from rltrain.weights.delta import apply
from rltrain.weights.line import call_trainer, receive_text, send_text
from rltrain.weights.sources import source_of

LOADED = "loaded"

logger = logging.getLogger(__name__)

# The weights as the trainer has sent them, if it is going to send changes: views of files in this engine's temporary
# directory, which all its ranks on a machine share. They all write the same.
_base: dict[str, Tensor] = {}


def load_weights(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Load buckets until the trainer hangs up; reports `LOADED` for each, or what went wrong.

    The name of the only entry is JSON: the arguments of `rltrain.weights.line.call_trainer`, and whether to receive
    the next bucket ahead, while one is loaded. Its tensor is empty.
    """
    ((text, _),) = named_tensors
    try:
        call = json.loads(text)
        ahead = call.pop("ahead")
        with closing(call_trainer(**call)) as line:
            for bucket, buffer in _received(line, ahead):
                send_text(line, buffer if isinstance(buffer, str) else _load(model, bucket, buffer))
    except Exception:
        logger.exception("weights can't be received")


def _received(line: socket.socket, ahead: bool) -> Iterator[tuple[Bucket, Tensor | str]]:
    """Every bucket and its bytes, or why they can't be read; where that takes time, the next while one is loaded."""

    def receive() -> tuple[Bucket, Tensor | str] | None:
        message = receive_text(line)
        if message is None:
            return None
        bucket, source = from_json(message)
        try:
            return bucket, source_of(source).read()
        except Exception as error:
            return bucket, f"{error}"

    if not ahead:
        yield from iter(receive, None)
        return
    with ThreadPoolExecutor(1) as receiver:
        coming = receiver.submit(receive)
        while (received := coming.result()) is not None:
            coming = receiver.submit(receive)
            yield received


def _load(model: Any, bucket: Bucket, buffer: Tensor) -> str:
    pieces = bucket.pieces
    for piece, digest, found in zip(pieces, bucket.digests, sample_digests(pieces, buffer), strict=True):
        if found != digest:
            return f"{piece.name} has another checksum than the trainer's"
    try:
        if bucket.keep is not None:
            _keep(bucket.keep, pieces, buffer)
        model.load_weights([(piece.name, _tensor(piece, buffer)) for piece in pieces])
    except Exception as error:
        return f"{pieces[0].name} to {pieces[-1].name} can't be loaded: {type(error).__name__}: {error}"
    return LOADED


def _keep(file_name: str, pieces: Sequence[Piece], buffer: Tensor) -> None:
    path = Path(tempfile.gettempdir()) / file_name
    kept = torch.from_file(str(path), shared=True, size=pieces[-1].end, dtype=torch.uint8)
    kept[pieces[0].start :] = buffer[pieces[0].start : pieces[-1].end]
    _base.update({piece.name: piece.of(kept) for piece in pieces})


def _tensor(piece: Piece, buffer: Tensor) -> Tensor:
    """The whole tensor; what is kept of it is changed too."""
    kept = _base.get(piece.name)
    if piece.changed is None:
        if kept is not None:
            kept.copy_(piece.of(buffer))
        return piece.of(buffer)
    if kept is None:
        raise LookupError(f"only changes of {piece.name} came, and what they were made to is not known here")
    apply(piece, buffer.cpu(), kept)
    return kept
