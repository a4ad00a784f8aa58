"""Files that one process writes while others read: lines of JSON that grow, and files that are replaced as a whole.

`events.jsonl` and `metrics.jsonl` grow line by line. `status.json`, checkpoints' manifests and Parquet files are
replaced by rename. So a reader never finds half a file, and at most one unfinished line.
"""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rltrain.run.errors import UserError

Record = dict[str, Any]


# JSON lines


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append an object as one line of JSON; what JSON does not know (paths, times) as text.

    A line that a crash left unfinished is ended first, so that it spoils only itself.
    """
    line = json.dumps(record, default=str)
    with path.open("a+b") as file:
        if file.tell() and _last_byte(file.fileno()) != b"\n":
            line = "\n" + line
        file.write(line.encode() + b"\n")


def _last_byte(fd: int) -> bytes:
    return os.pread(fd, 1, os.fstat(fd).st_size - 1)


def append_event(path: Path, attempt: int, kind: str, fields: Mapping[str, Any]) -> None:
    """Append an event to `events.jsonl`: `time` (Unix seconds), `attempt`, `kind` and then `fields`."""
    own = {"time": time.time(), "attempt": attempt, "kind": kind}
    append_line(path, {**own, **fields, **own})


class EventLog:
    """Events of one attempt, which begins now, from any thread.

    Beside `time` each says `elapsed_s`, the seconds of the attempt: the clock may jump, these do not.
    """

    def __init__(self, path: Path, attempt: int) -> None:
        self._path, self._attempt, self._lock = path, attempt, threading.Lock()
        self._begun = time.monotonic()

    def append(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Append an event."""
        with self._lock:
            elapsed = round(time.monotonic() - self._begun, 3)
            append_event(self._path, self._attempt, kind, {**fields, "elapsed_s": elapsed})


def read_lines(path: Path) -> list[Record]:
    """The objects of a file of JSON lines; none if there is no such file. See `parse_lines`."""
    return parse_lines(finished_lines(path))


def read_last_lines(path: Path, max_bytes: int) -> list[Record]:
    """The objects at the end of a file of JSON lines, looking at no more than `max_bytes` of it."""
    return parse_lines(_last_bytes(path, max_bytes))


def newest_lines(path: Path, max_bytes: int) -> Iterator[Record]:
    """The same, the last one first; each is parsed when it is asked for."""
    for line in reversed(_last_bytes(path, max_bytes).split(b"\n")):
        yield from parse_lines(line)


def _last_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - max_bytes))
            return _finished(file.read())
    except FileNotFoundError:
        return b""


class GrowingLines:
    """Objects of a growing file of JSON lines, each given once; a line without its end waits for it."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[Record]:
        """Objects that are new since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = _finished(file.read())
        except PermissionError:
            raise
        except OSError:  # not there yet; or a network disk fails for a moment, and the next call gives it all
            return []
        self._offset += len(data)
        return parse_lines(data)


def finished_lines(path: Path) -> bytes:
    """The lines of a file that have their newline (the last one may still be being written); b"" without a file."""
    try:
        return _finished(path.read_bytes())
    except FileNotFoundError:
        return b""


def _finished(data: bytes) -> bytes:
    return data if data.endswith(b"\n") else data[: data.rfind(b"\n") + 1]


def parse_lines(
    data: bytes,
    complain: Callable[[int, str], object] = lambda number, reason: None,
    check: Callable[[Record, Callable[[str], object]], Record | None] = lambda record, say: record,
) -> list[Record]:
    """The objects of JSON lines, in order; empty lines are nothing.

    Args:
        data: lines.
        complain: is told the number (from 1) of each line that is not a JSON object, and why. A crash may have cut it
            short. Such a line is left out.
        check: the object as it is wanted, or None for one to leave out; tells what is wrong with it.
    """
    records = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            complain(number, str(error))
            continue
        if not isinstance(record, dict):
            complain(number, "the line is not a JSON object")
        elif (checked := check(record, partial(complain, number))) is not None:
            records.append(checked)
    return records


def readable_size(size: float) -> str:
    """A number of bytes for people: `300 bytes`, `1.5 MiB`, `12 GiB`."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}" if size < 10 and units[0] != "bytes" else f"{size:.0f} {units[0]}"


# Files that are replaced as a whole


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Write a file so that a reader finds the old one or the new one, never a part.

    The new one takes its name when the block ends. If the block raises, the old one stays. Until then its name begins
    with a dot: readers of run directories skip such files.

    Args:
        path: in a directory that exists.
        durable: also after a power cut; takes as long as the disk does.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def replace_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a text file as a whole. See `replacing`."""
    with replacing(path, durable) as file:
        file.write(text.encode())


def replace_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, a name beside it; a reader finds the old target or the new one."""
    draft = link.with_name(f".{link.name}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    draft.replace(link)


def share_like(directory: Path) -> None:
    """From now on, the group may read files that this process makes, if it may read `directory`.

    Nobody else may write it, whatever the user's umask.
    """
    if directory.stat().st_mode & stat.S_IRGRP:
        os.umask(0o027)
    else:  # what it will unpickle, others must not have been able to write: see `others_may_write`
        os.umask(os.umask(0o077) | 0o022)


def share(directory: Path) -> None:
    """Let the group read a directory and all below it that is ours."""
    for path in [directory, *directory.rglob("*")]:
        if not path.is_symlink() and (found := path.stat()).st_uid == os.geteuid():
            path.chmod(stat.S_IMODE(found.st_mode) | (0o050 if path.is_dir() else 0o040))


def owner_of(path: Path) -> str:
    """Name of the user to whom a file belongs, or the number of one without a name; `someone` if that can't be seen."""
    try:
        return path.owner()
    except KeyError:
        return f"user {path.stat().st_uid}"
    except OSError:
        return "someone"


def others_may_write(path: Path) -> str | None:
    """Why a file may hold what another user put there: it is another's, or its group or all may write it. None if not.

    Unpickling a file runs code that is in it, so it must not. Root is trusted. A directory that only we may enter
    keeps everybody else from its content.
    """
    path = path.resolve()
    trusted, found = {os.geteuid(), 0}, path.stat()
    if found.st_uid not in trusted:
        return f"{path} belongs to {owner_of(path)}"
    if not found.st_mode & (0o002 if _is_private(found.st_gid) else 0o022):
        return None
    above = (place.stat() for place in path.parents)
    if any(place.st_uid in trusted and not place.st_mode & 0o011 for place in above):
        return None
    return f"{path} is writable by {'everybody' if found.st_mode & 0o002 else 'its group'}"


def _is_private(gid: int) -> bool:
    """Whether a group has only this user in it: many systems make one for each user, with a umask of 002."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def own_file(path: Path) -> Path:
    """`path`, which is about to be unpickled.

    Raises:
        UserError: others may have written it.
    """
    if why := others_may_write(path):
        raise UserError(f"{why}, and reading it runs the code in it. If you trust it: chmod go-w {path}")
    return path


def put_in_place(temporary: Path, final: Path) -> None:
    """Give a finished directory its name, also after a power cut, in place of a directory that has it.

    That one is put aside for the rename and removed afterwards, so that one of the two is always whole.

    Raises:
        OSError: it can't have the name; what was there still has it.
    """
    aside = final.with_name(f".{final.name}.old")
    if aside.exists() and not final.exists():  # a power cut came between the two renames
        aside.rename(final)
    shutil.rmtree(aside, ignore_errors=True)
    for path in (each for each in temporary.rglob("*") if each.is_file()):
        _sync(path)
    has_old = final.is_dir() and not final.is_symlink()
    if has_old:
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if has_old:
            aside.rename(final)
        raise
    sync_directory(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Make renames in it durable, where the file system knows of that: some of objects or in user space do not."""
    try:
        _sync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> Record:
    """The object that a JSON file of a person's holds, such as a model's `config.json`.

    Raises:
        UserError: there is no such file, it can't be read, or it holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: expected an object with names and values, but it is a {type(found).__name__}."
        )
    return found


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is no such file, or if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


class StatusFile:
    """`status.json` of one attempt: fields are merged, the file is replaced as a whole."""

    def __init__(self, path: Path, attempt: int) -> None:
        self._path, self._attempt, self._lock = path, attempt, threading.Lock()
        self._fields: Record = {}

    def update(self, fields: Mapping[str, Any]) -> None:
        """Merge what is not None and write; `time` (Unix seconds) and `attempt` are ours."""
        with self._lock:
            self._fields.update({name: value for name, value in fields.items() if value is not None})
            self._fields.update(time=time.time(), attempt=self._attempt)
            replace_text(self._path, json.dumps(self._fields))

    def get(self, name: str) -> Any:
        """A field, or None."""
        with self._lock:
            return self._fields.get(name)
