"""The transport `disk`, through a shared file system: the trainer writes files, and every engine reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rltrain.weights.buckets import Bucket, Part, in_buckets, lay_out, message, sample_digests, to_json, write
from rltrain.weights.engine import ServerEngine
from rltrain.weights.session import Session
from rltrain.weights.sources import File, describe
from rltrain.weights.transports.current import current_weights, load_from_disk, set_current
from rltrain.weights.transports.hf_directory import pieces_of


@dataclass(frozen=True)
class BucketFile:
    """A bucket in a file."""

    source: File
    bucket: Bucket


class ModelDirectories:
    """A Hugging Face directory per version, `root/v000012`, which engines that were started again find too."""

    def __init__(self, root: Path, host: str) -> None:
        """Engines reach us at this machine's address `host`."""
        self._root, self._host = root, host

    def make_room(self, version: int) -> Path:
        """Where to write this version.

        The version before stays until the next: an engine that was started again may be reading it.
        """
        _remove_all_but(current_weights(self._root), self._root)
        return _directory(self._root, version)

    def send(self, version: int, find_engines: Callable[[], Sequence[ServerEngine]]) -> dict[str, str]:
        """Make a version that has been written the current one; otherwise like `rltrain.weights.rounds.Rounds.send`.

        Engines are looked up after that: one that can't be found yet will look for itself.
        """
        directory = _directory(self._root, version)
        set_current(directory)
        engines = find_engines()
        external = Session([each for each in engines if not each.is_ours], version, self._host)
        external.each(lambda engine: load_from_disk(engine, directory))
        ours = [each for each in engines if each.is_ours]
        return external.failures | _send_files(ours, version, self._host, list(_shards(directory)))


class BucketFiles:
    """Buckets in files of `root/v000012`; each version takes the place of the one before."""

    def __init__(self, root: Path, bucket_bytes: int, host: str) -> None:
        """Engines reach us at this machine's address `host`."""
        self._root, self._bucket_bytes, self._host = root, bucket_bytes, host

    def send(
        self, version: int, engines: Sequence[ServerEngine], parts: Iterable[Part], keep: str | None = None
    ) -> dict[str, str]:
        """See `rltrain.weights.rounds.Rounds.send`.

        Raises:
            OSError: a file can't be written; the engines still have the version before.
        """
        _remove_all_but(None, self._root)
        files = list(self._write(_directory(self._root, version), parts, keep))
        return _send_files(engines, version, self._host, files)

    def _write(self, directory: Path, parts: Iterable[Part], keep: str | None) -> Iterator[BucketFile]:
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


def _send_files(
    engines: Sequence[ServerEngine], version: int, host: str, files: Sequence[BucketFile]
) -> dict[str, str]:
    session = Session(engines, version, host)
    try:
        session.begin()
        for file in files:
            text = message(to_json(file.bucket, describe(file.source)))
            session.each(partial(_send_file, session, text))
        session.end()
    finally:
        session.drop()
    return session.failures


def _send_file(session: Session, text: str, engine: ServerEngine) -> None:
    session.refresh_channel(engine)
    session.send(engine, text)
    session.confirm(engine)


def _write_bucket(path: Path, bucket: Sequence[Part], keep: str | None) -> BucketFile:
    pieces = lay_out(bucket)
    buffer = torch.zeros(pieces[-1].end, dtype=torch.uint8)
    write(bucket, pieces, buffer)
    path.write_bytes(buffer.numpy().data)
    return BucketFile(File(str(path), len(buffer)), Bucket(pieces, sample_digests(pieces, buffer), keep))


def _shards(directory: Path) -> Iterator[BucketFile]:
    for path in sorted(directory.glob("*.safetensors")):
        pieces, size = pieces_of(path), path.stat().st_size
        buffer = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        yield BucketFile(File(str(path), size), Bucket(pieces, sample_digests(pieces, buffer)))


def _directory(root: Path, version: int) -> Path:
    return root / f"v{version:06d}"


def _remove_all_but(kept: Path | None, root: Path) -> None:
    for other in root.glob("*"):
        if other != kept and other.is_dir() and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)
