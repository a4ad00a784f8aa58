"""Weight updates through a shared file system: the trainer writes files, every engine reads them."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from rltrain.weights.buckets import Part, in_buckets, lay_out, sample_digests, write
from rltrain.weights.current import EngineClient, current_weights, load_weights, set_current
from rltrain.weights.hf_directory import pieces_of, write_hf_directory
from rltrain.weights.session import Bucket, Session, SessionEngine, give, tell
from rltrain.weights.sources import File
from rltrain.weights.update import FindEngines, Update


class DiskEngine(EngineClient, SessionEngine, Protocol):
    """What is needed of `rltrain.sglang.engines.JobEngine`."""

    is_ours: bool  # started by the job, so that it has our loader


@dataclass(frozen=True)
class Filled:
    """A bucket in a file."""

    path: Path
    bucket: Bucket

    def load_into(self, engine: SessionEngine) -> None:
        """Have an engine load it; see `session.give`."""
        unseen = f"it does not see {self.path}: is it on a file system that engines and trainer share?"
        give(engine, lambda: self._offer(engine), unseen)

    def _offer(self, engine: SessionEngine) -> list[str]:
        size, name = self.path.stat().st_size, uuid.uuid4().hex
        reports = [
            self.path.with_name(f".{name}-{rank}.report") for rank in range(engine.tensor_parallel_size())
        ]
        try:
            tell(engine, self.bucket, [File(str(self.path), size, str(report)) for report in reports])
            return [report.read_text() if report.exists() else "" for report in reports]
        finally:
            for report in reports:
                report.unlink(missing_ok=True)


class DiskTransport:
    """Through `root/v000012`: a Hugging Face directory that a restarted engine finds too, or files with changes."""

    def __init__(self, root: Path, template: Path, bucket_bytes: int) -> None:
        """Take all but the weights from the model directory `template`."""
        self._root, self._template, self._bucket_bytes = root, template, bucket_bytes

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
        session = Session(find_engines())
        external = Session([engine for engine in session.engines if not engine.is_ours])
        external.each(lambda engine: load_weights(engine, directory))
        session.engines = [engine for engine in session.engines if engine.is_ours]
        with session.updating(update.version):
            for filled in files:
                session.each(filled.load_into)
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


def _write_bucket(path: Path, bucket: Sequence[Part]) -> Filled:
    pieces = lay_out(bucket)
    buffer = torch.zeros(pieces[-1].end, dtype=torch.uint8)
    write(bucket, pieces, buffer)
    path.write_bytes(buffer.numpy().data)
    return Filled(path, Bucket(pieces, sample_digests(pieces, buffer)))


def _shards(directory: Path, keep: str | None) -> Iterator[Filled]:
    for number, path in enumerate(sorted(directory.glob("*.safetensors"))):
        pieces = pieces_of(path)
        buffer = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        kept = f"{keep}-{number}" if keep else None
        yield Filled(path, Bucket(pieces, sample_digests(pieces, buffer), kept))


def _remove_all_but(kept: Path | None, root: Path) -> None:
    for other in root.glob("*"):
        if other != kept and other.is_dir() and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)
