"""Weight updates through a shared file system: the trainer writes files, every engine reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from rltrain.weights.buckets import Bucket, Part, in_buckets, lay_out, sample_digests, write
from rltrain.weights.current import EngineClient, current_weights, load_weights, set_current
from rltrain.weights.hf_directory import pieces_of
from rltrain.weights.session import E, Session, SessionEngine
from rltrain.weights.sources import File


class DiskEngine(EngineClient, SessionEngine, Protocol):
    """What is needed of `rltrain.sglang.engines.JobEngine`."""

    is_ours: bool  # started by the job, so that it has our loader


@dataclass(frozen=True)
class Filled:
    """A bucket in a file."""

    source: File
    bucket: Bucket


class Directories:
    """A Hugging Face directory a version, `root/v000012`, which engines that were started again find too."""

    def __init__(self, root: Path, host: str) -> None:
        """Engines reach us at this machine's address `host`."""
        self._root, self._host = root, host

    def make_room(self, version: int) -> Path:
        """Where this version is to be written.

        The one before stays until the next: an engine that was started again may be reading it.
        """
        _remove_all_but(current_weights(self._root), self._root)
        return _directory(self._root, version)

    def push(self, version: int, find_engines: Callable[[], Sequence[DiskEngine]]) -> dict[str, str]:
        """Make a version that has been written the current one; else see `rltrain.weights.sharing.Sharing.push`.

        Engines are looked up then: one that is not yet to be found will look for itself.
        """
        directory = _directory(self._root, version)
        set_current(directory)
        engines = find_engines()
        external = Session([each for each in engines if not each.is_ours], version, self._host)
        external.each(lambda engine: load_weights(engine, directory))
        ours = [each for each in engines if each.is_ours]
        return external.failures | _load_all(ours, version, self._host, list(_shards(directory)))


class DiskTransport:
    """Buckets in files of `root/v000012`; each version takes the place of the one before."""

    def __init__(self, root: Path, bucket_bytes: int, host: str) -> None:
        """Engines reach us at this machine's address `host`."""
        self._root, self._bucket_bytes, self._host = root, bucket_bytes, host

    def push(
        self, version: int, engines: Sequence[E], parts: Iterable[Part], keep: str | None = None
    ) -> dict[str, str]:
        """See `rltrain.weights.sharing.Sharing.push`.

        Raises:
            OSError: it can't be written; the engines still have the version before.
        """
        _remove_all_but(None, self._root)
        files = list(self._write(_directory(self._root, version), parts, keep))
        return _load_all(engines, version, self._host, files)

    def _write(self, directory: Path, parts: Iterable[Part], keep: str | None) -> Iterator[Filled]:
        try:
            directory.mkdir(parents=True)
            for number, bucket in enumerate(in_buckets(parts, self._bucket_bytes)):
                kept = f"{keep}-{number}" if keep else None
                yield _write_bucket(directory / f"bucket-{number:05d}", bucket, kept)
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)  # a full disk needs the room
            raise OSError(
                f"{directory} can't be written ({error}): is the disk full, or read-only?"
            ) from error


def _load_all(engines: Sequence[E], version: int, host: str, files: Sequence[Filled]) -> dict[str, str]:
    session = Session(engines, version, host)
    try:
        session.begin()
        for filled in files:
            session.each(partial(_load, session, filled))
        session.end()
    finally:
        session.drop()
    return session.failures


def _load(session: Session[E], filled: Filled, engine: E) -> None:
    session.refresh_line(engine)
    session.tell(engine, filled.bucket, [filled.source] * engine.tensor_parallel_size())
    session.await_reports(engine)


def _write_bucket(path: Path, bucket: Sequence[Part], keep: str | None) -> Filled:
    pieces = lay_out(bucket)
    buffer = torch.zeros(pieces[-1].end, dtype=torch.uint8)
    write(bucket, pieces, buffer)
    path.write_bytes(buffer.numpy().data)
    return Filled(File(str(path), len(buffer)), Bucket(pieces, sample_digests(pieces, buffer), keep))


def _shards(directory: Path) -> Iterator[Filled]:
    for path in sorted(directory.glob("*.safetensors")):
        pieces, size = pieces_of(path), path.stat().st_size
        buffer = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        yield Filled(File(str(path), size), Bucket(pieces, sample_digests(pieces, buffer)))


def _directory(root: Path, version: int) -> Path:
    return root / f"v{version:06d}"


def _remove_all_but(kept: Path | None, root: Path) -> None:
    for other in root.glob("*"):
        if other != kept and other.is_dir() and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)
