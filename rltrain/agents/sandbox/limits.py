"""What a sandbox allows, and what became of a command in it."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


class SandboxError(RuntimeError):
    """The sandbox failed, not the program in it: it did not start, or it was ended."""


@dataclass(frozen=True)
class Limits:
    """Limits of one sandbox.

    Attributes:
        memory: bytes, of all its processes together; files in its home and /tmp count against `disk` instead.
        processes: processes and threads at a time.
        disk: bytes in its home, and the same again in /tmp.
        output: bytes that are kept of what a command prints, the last ones, of each of its two streams.
        file: bytes of the largest file that is read out of it.
    """

    memory: int = 2048 * MIB
    processes: int = 128
    disk: int = 512 * MIB
    output: int = 64 * 1024
    file: int = 16 * MIB


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code, negative for a signal, or None if we ended it: see `reason`.
        reason: "" or the limit that it met, in words.
        stdout, stderr: the end of what it printed.
        printed: bytes that it printed altogether.
        seconds: wall-clock time.
    """

    code: int | None
    reason: str
    stdout: bytes
    stderr: bytes
    printed: int
    seconds: float

    @property
    def failure(self) -> str:
        """Why it did not succeed, in words; "" if it did."""
        if self.reason:
            return self.reason
        if self.code is not None and self.code < 0:
            return f"ended by signal {-self.code}"
        return f"exit code {self.code}" if self.code else ""
