"""What srun says of a step: the supervisor learns from it which task has failed.

It is kept in memory. A log on the run's disk would lose a line while that is full, and thousands of them would be read
over a shared file system every second. The log gets a copy.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class Said:
    """Output of a process that was given `fd` for it.

    Args:
        log: gets a copy, a little later, as soon as there is room.
    """

    def __init__(self, log: Path) -> None:
        self.fd: int | None = os.memfd_create(log.name)
        self._log, self._text, self._copied = log, b"", 0
        with suppress(OSError):
            log.touch()  # readers find that nothing was said

    def read(self, has_ended: bool) -> str:
        """All of it so far.

        Args:
            has_ended: whether the process, which will say no more, had done so before this call.
        """
        if self.fd is not None:
            if os.fstat(self.fd).st_size > len(self._text):
                self._text += os.pread(self.fd, os.fstat(self.fd).st_size - len(self._text), len(self._text))
            if has_ended:
                os.close(self.fd)
                self.fd = None
        if self._copied < len(self._text):
            with suppress(OSError), self._log.open("ab", buffering=0) as file:
                self._copied += file.write(self._text[self._copied :])
        return self._text.decode(errors="replace")


def allow_many_files() -> Callable[[], None]:
    """Let this process have as many files open as it may; returns what gives a child the limit of before."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # the hard limit may be more than the kernel gives anybody
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before)
