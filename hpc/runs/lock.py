"""One running job per run directory: an flock(2) that the kernel releases when its holder dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime

from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout

# Another `submit` may hold the lock for the moment in which it finds out that the run is free.
_PATIENCE_SECONDS = 1.0


@dataclass(frozen=True)
class Holder:
    """Who holds a run's lock: the supervisor of the attempt that is running, or a `submit` for a moment."""

    pid: int
    host: str
    since: float  # Unix seconds

    @property
    def is_here(self) -> bool:
        """Whether `pid` is a process of this machine."""
        return self.host == socket.gethostname()


def find_holder(layout: RunLayout) -> Holder | None:
    """Who holds the run's lock now; None if nobody does, or if the file system has no locks to ask for."""
    try:
        fd = os.open(layout.lock, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):  # of a run that is read, and not resumed
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(fd) or Holder(0, "", 0.0)
    except OSError:
        return None
    else:
        return None
    finally:
        os.close(fd)


@contextmanager
def hold_lock(layout: RunLayout) -> Iterator[None]:
    """Hold the run's lock.

    Raises:
        UserError: a job holds it; the message says which process, where and since when.
    """
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o640)
    try:
        _acquire(fd, layout)
        holder = Holder(os.getpid(), socket.gethostname(), time.time())
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(asdict(holder)).encode(), 0)
        yield
    finally:
        os.close(fd)


def _acquire(fd: int, layout: RunLayout) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(_explain(fd, layout)) from None
            time.sleep(0.05)


def _read_holder(fd: int) -> Holder | None:
    """None if it holds the lock, but has not yet written who it is."""
    try:
        return Holder(**json.loads(os.pread(fd, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _explain(fd: int, layout: RunLayout) -> str:
    who = "another process"
    if holder := _read_holder(fd):
        since = datetime.fromtimestamp(holder.since).strftime("%Y-%m-%d %H:%M:%S")
        who = f"process {holder.pid} on {holder.host}, since {since}"
    return (
        f"the run {layout.name} ({layout.root}) belongs to a job that is running: {who}. Wait for it, stop it"
        " (Ctrl-C where it was submitted), or give another --name."
    )
