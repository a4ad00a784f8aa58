"""Runs inside an SGLang engine: loads weights that the trainer offers, and says whether they are those it meant.

SGLang calls it on every rank, because it is one of the engine's `--custom-weight-loader` (`rltrain.sglang.adapter`).
What comes over HTTP is only which tensors there are, their checksums, and where to read them. Everything that goes
wrong is reported there: an exception in a loader would end the engine.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltrain.weights.buckets import Piece, from_json, sample_digests
from rltrain.weights.delta import apply
from rltrain.weights.sources import source_of

LOADED = "loaded"

logger = logging.getLogger(__name__)

# The weights as the trainer has sent them, if it is going to send changes: views of files in this engine's temporary
# directory, which all its ranks on a machine share. They all write the same.
_base: dict[str, Tensor] = {}


def load_weights(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Load one bucket; the name of the only entry is `buckets.to_json` of it, and its tensor is empty.

    Beside the pieces this has `source` (see `rltrain.weights.sources`) and `keep`: the name of a file to keep the
    bucket in, so that changes can be made to it; or none. Reports `LOADED`, or what went wrong; nothing where the
    source can't be seen. Without pieces it does nothing: such a call only tells SGLang the version.
    """
    ((text, _),) = named_tensors
    pieces, digests, fields = from_json(text)
    if not pieces:
        return
    try:
        source = source_of(fields["source"])  # type: ignore[arg-type]
        buffer = source.read()
        if buffer is not None:
            keep = fields["keep"]
            source.report(_load(model, pieces, digests, buffer, None if keep is None else str(keep)))
    except Exception:
        logger.exception("weights can't be received")


def _load(
    model: Any, pieces: Sequence[Piece], digests: Sequence[int], buffer: Tensor, keep: str | None
) -> str:
    for piece, digest, found in zip(pieces, digests, sample_digests(pieces, buffer), strict=True):
        if found != digest:
            return f"{piece.name} has another checksum than the trainer's"
    try:
        if keep is not None:
            _keep(keep, pieces, buffer)
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
