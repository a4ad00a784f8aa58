"""Weight updates through a shared file system: the trainer writes files, every engine reads them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from rltrain.weights.buckets import Bucket, Part, in_buckets, lay_out, sample_digests, write
from rltrain.weights.current import EngineClient, current_weights, load_weights, set_current
from rltrain.weights.hf_directory import pieces_of, write_hf_directory
from rltrain.weights.session import Session, SessionEngine
from rltrain.weights.sources import File
from rltrain.weights.update import FindEngines, Update


class DiskEngine(EngineClient, SessionEngine, Protocol):
    """What is needed of `rltrain.sglang.engines.JobEngine`."""

    is_ours: bool  # started by the job, so that it has our loader


@dataclass(frozen=True)
class Filled:
    """A bucket in a file."""

    source: File
    bucket: Bucket


class DiskTransport:
    """Through `root/v000012`: a Hugging Face directory that a restarted engine finds too, or files with changes."""

    def __init__(self, root: Path, template: Path, bucket_bytes: int, host: str) -> None:
        """Take all but the weights from the model directory `template`; engines reach us at the address `host`."""
        self._root, self._template = root, template
        self._bucket_bytes, self._host = bucket_bytes, host

    def push(self, update: Update, find_engines: FindEngines[DiskEngine]) -> dict[str, str]:
        """See `rltrain.weights.transport.Transport.push`.

        The version before stays until the next push: an engine that was started again may be reading it. For the same
        reason engines are looked up when the new version is there: one that is not yet to be found will look for
        itself.

        Raises:
            OSError: it can't be written; the engines still have the version before.
        """
        _remove_all_but(current_weights(self._root), self._root)
        directory = self._root / f"v{update.version:06d}"
        if update.is_whole:
            tensors = ((part.name, part.data) for part in update.parts)
            write_hf_directory(directory, tensors, self._template)
            if update.keep is None:
                set_current(directory)
            files = list(_shards(directory, update.keep))
        else:
            files = list(self._write_changes(directory, update.parts))
        engines = find_engines()
        external = Session([each for each in engines if not each.is_ours], update.version, self._host)
        external.each(lambda engine: load_weights(engine, directory))
        session = Session([each for each in engines if each.is_ours], update.version, self._host)
        with session.updating():
            for filled in files:
                session.each(partial(_load, session, filled))
        return external.failures | session.failures

    def _write_changes(self, directory: Path, parts: Iterable[Part]) -> Iterator[Filled]:
        try:
            directory.mkdir(parents=True)
            for number, bucket in enumerate(in_buckets(parts, self._bucket_bytes)):
                yield _write_bucket(directory / f"changes-{number:05d}", bucket)
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)  # a full disk needs the room
            raise OSError(
                f"{directory} can't be written ({error}): is the disk full, or read-only?"
            ) from error


def _load(session: Session[DiskEngine], filled: Filled, engine: DiskEngine) -> None:
    session.tell(engine, filled.bucket, lambda rank: filled.source)
    session.await_reports(engine)


def _write_bucket(path: Path, bucket: Sequence[Part]) -> Filled:
    pieces = lay_out(bucket)
    buffer = torch.zeros(pieces[-1].end, dtype=torch.uint8)
    write(bucket, pieces, buffer)
    path.write_bytes(buffer.numpy().data)
    return Filled(File(str(path), len(buffer)), Bucket(pieces, sample_digests(pieces, buffer)))


def _shards(directory: Path, keep: str | None) -> Iterator[Filled]:
    for number, path in enumerate(sorted(directory.glob("*.safetensors"))):
        pieces = pieces_of(path)
        buffer = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        kept = f"{keep}-{number}" if keep else None
        yield Filled(File(str(path), len(buffer)), Bucket(pieces, sample_digests(pieces, buffer), kept))


def _remove_all_but(kept: Path | None, root: Path) -> None:
    for other in root.glob("*"):
        if other != kept and other.is_dir() and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)
