"""Writers of `events.jsonl` and `status.json`: what happened to the job, and what it does now."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_event(path: Path, attempt: int, kind: str, fields: Mapping[str, Any]) -> None:
    """Append one event as a line of JSON: `time` (Unix seconds), `attempt`, `kind` and then `fields`.

    A line that a crash left unfinished is ended first, so that it spoils only itself.
    """
    own = {"time": time.time(), "attempt": attempt, "kind": kind}
    line = json.dumps({**own, **fields, **own}, default=str)
    with path.open("a+b") as file:
        if file.tell() and _last_byte(file.fileno()) != b"\n":
            line = "\n" + line
        file.write(line.encode() + b"\n")


def _last_byte(fd: int) -> bytes:
    return os.pread(fd, 1, os.fstat(fd).st_size - 1)


class EventLog:
    """Events of one attempt, from any thread."""

    def __init__(self, path: Path, attempt: int) -> None:
        self._path, self._attempt, self._lock = path, attempt, threading.Lock()

    def append(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Append an event."""
        with self._lock:
            append_event(self._path, self._attempt, kind, fields)


class StatusFile:
    """`status.json` of one attempt: fields are merged, the file is replaced as a whole."""

    def __init__(self, path: Path, attempt: int) -> None:
        self._path, self._attempt, self._lock = path, attempt, threading.Lock()
        self._fields: dict[str, Any] = {}

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


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
