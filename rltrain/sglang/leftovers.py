"""What a server leaves on its node: a directory for its sockets and files, and shared memory under names.

Both are removed when the server ends. A role that was killed can't do that, so the next one that starts on the node
does: a directory whose lock is free has no owner. The lock is the kernel's: it ends with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil

_PREFIX = "slurmlime-"
_OWNER = (
    ".owner"  # locked by the process that uses the directory; holds the names of its server's shared memory
)
_SHARED_MEMORY = Path("/dev/shm")


class NodeDirectory:
    """A temporary directory of this process's server; directories that killed processes left are removed first."""

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        new = (
            self.path / f"{_OWNER}.new"
        )  # has its name once it is locked: another role may sweep at this moment
        self._owner = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._owner, fcntl.LOCK_EX)
        new.rename(self.path / _OWNER)
        self._shared: set[str] = set()

    def note_shared_memory(self, server: int) -> None:
        """Write down which shared memory the server with this process id and its children have made under names."""
        self._shared |= {path.name for path in _shared_memory_of(server)}
        os.ftruncate(self._owner, 0)
        os.pwrite(self._owner, json.dumps(sorted(self._shared)).encode(), 0)

    def remove(self) -> None:
        """Remove the directory and the shared memory; the server has ended."""
        _remove_shared_memory(self._shared)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._owner)


def sweep(parent: Path) -> list[Path]:
    """Remove what processes of this user left in `parent` when they were killed; returns the directories."""
    removed = []
    for directory in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another's, or just being removed
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            owner = os.open(directory / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(ValueError):
                    _remove_shared_memory(json.loads(os.pread(owner, 1 << 16, 0)))
                shutil.rmtree(directory)
                removed.append(directory)
            finally:
                os.close(owner)
    return removed


def _remove_shared_memory(names: Iterable[str]) -> None:
    for name in names:
        if name.startswith("sglang_") and "/" not in name:
            (_SHARED_MEMORY / name).unlink(missing_ok=True)


def _shared_memory_of(server: int) -> set[Path]:
    """Shared memory that SGLang's schedulers have made under names, and do not remove when they end."""
    try:
        processes = psutil.Process(server).children(recursive=True)
        files = [Path(file.path) for process in processes for file in process.open_files()]
    except psutil.Error:
        return set()  # it has ended by itself
    return {path for path in files if path.parent == _SHARED_MEMORY and path.name.startswith("sglang_")}
