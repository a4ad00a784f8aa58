"""The engine's side of a push, inside SGLang: receives the trainer's buckets, checks and loads them, and reports.

SGLang calls `load_weights` on every rank, because it is one of the engine's `--custom-weight-loader`
(`rltrain.sglang.adapter`). HTTP only tells a rank where to call the trainer. The trainer then says bucket by bucket
which tensors there are, their checksums, and where to read them. Everything that goes wrong is reported to the trainer:
an exception in a loader would end the engine.
"""

from __future__ import annotations

import json
import logging
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rltrain.weights.buckets import Bucket, Piece, from_message, sample_digests
from rltrain.weights.channel import LOADED, call_trainer, receive_message, send_message
from rltrain.weights.cuda_threads import Mark, finish_work, thread_pool
from rltrain.weights.cuts import Cuts
from rltrain.weights.delta import apply
from rltrain.weights.sources import Reader, source_of

logger = logging.getLogger(__name__)

# The weights as the trainer has sent them, if it is going to send changes: views of files in this engine's temporary
# directory. All its ranks on a machine share them, and all write the same.
_base: dict[str, Tensor] = {}
_cuts: WeakKeyDictionary[Any, Cuts] = WeakKeyDictionary()  # by model

# SGLang's loader of gpt-oss sets them to zero on all ranks but one, and the others read the same memory.
_OVERWRITTEN = "mlp.experts.down_proj_bias"


def load_weights(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Load rounds of buckets until the trainer closes the channel; reports `LOADED` for each, or what went wrong first.

    The name of the only entry is JSON: the arguments of `rltrain.weights.channel.call_trainer`, whether to receive the
    next bucket `ahead`, while one is being loaded, what the `engine` is called, and its `size`. Its tensor is empty.
    """
    ((text, _),) = named_tensors
    try:
        call = json.loads(text)
        ahead, reader = call.pop("ahead"), Reader(call.pop("engine"), call["rank"], call.pop("size"))
        _cuts.setdefault(model, Cuts()).begin(reader.engine)
        with closing(call_trainer(**call)) as trainer:
            problems: list[str] = []
            for received in _receive(trainer, reader, ahead):
                received.mark.wait()
                report = received.problem
                if report is None:
                    report = _load(model, received.bucket, received.buffer)
                problems += [report] if report != LOADED else []
                if received.is_last:
                    send_message(trainer, problems[0] if problems else LOADED)
                    problems.clear()
    except Exception:
        logger.exception("weights can't be received")


@dataclass(frozen=True)
class _Received:
    """A bucket and its bytes, or why they can't be read. On a GPU they are there once it has come to the mark."""

    bucket: Bucket
    buffer: Tensor
    problem: str | None
    mark: Mark
    is_last: bool  # of its round


def _receive(trainer: socket.socket, reader: Reader, ahead: bool) -> Iterator[_Received]:
    """Every bucket; with `ahead` the next is read while one is loaded."""
    told: list[tuple[Bucket, dict[str, Any]]] = []

    def receive() -> _Received | None:
        if not told:
            message = receive_message(trainer)
            if message is None:
                return None
            told.extend(from_message(message))
        bucket, source = told.pop(0)
        try:
            return _Received(bucket, source_of(source).read(reader), None, Mark(), not told)
        except Exception as error:
            return _Received(bucket, torch.empty(0), f"{error}", Mark(), not told)

    if not ahead:
        yield from iter(receive, None)
        return
    with thread_pool(1, own_streams=True) as receiver:
        coming = receiver.submit(receive)
        while (received := coming.result()) is not None:
            coming = receiver.submit(receive)
            yield received


def _load(model: Any, bucket: Bucket, buffer: Tensor) -> str:
    """Check the bucket against the trainer's checksums and load it; returns the report."""
    pieces = bucket.pieces
    for piece, digest, found in zip(pieces, bucket.digests, sample_digests(pieces, buffer), strict=True):
        if found != digest:
            return f"{piece.name} has a checksum other than the trainer's"
    try:
        if bucket.keep is not None:
            _keep(bucket.keep, pieces, buffer)
        here = [(piece.name, _tensor(model, piece, buffer)) for piece in pieces]
        named = [(name, tensor) for name, tensor in here if tensor is not None]
        if named:
            model.load_weights([(name, t.clone() if name.endswith(_OVERWRITTEN) else t) for name, t in named])
        finish_work()  # the trainer, or the next bucket but one, writes into this buffer again
    except Exception as error:
        return f"{pieces[0].name} to {pieces[-1].name} can't be loaded: {type(error).__name__}: {error}"
    return LOADED


def _keep(file_name: str, pieces: Sequence[Piece], buffer: Tensor) -> None:
    path = Path(tempfile.gettempdir()) / file_name
    kept = torch.from_file(str(path), shared=True, size=pieces[-1].end, dtype=torch.uint8)
    kept[pieces[0].start :] = buffer[pieces[0].start : pieces[-1].end]
    _base.update({piece.name: piece.of(kept) for piece in pieces})


def _tensor(model: Any, piece: Piece, buffer: Tensor) -> Tensor | None:
    """The whole tensor, or None if more of it is to come; the copy that is kept is updated too."""
    if piece.first is not None:
        return _cuts[model].add(piece, buffer)
    kept = _base.get(piece.name)
    if piece.changed is None:
        if kept is not None:
            kept.copy_(piece.of(buffer))
        return piece.of(buffer)
    if kept is None:
        raise LookupError(
            f"only changes of {piece.name} arrived, and the values that they apply to are unknown here"
        )
    apply(piece, buffer, kept)
    return kept
