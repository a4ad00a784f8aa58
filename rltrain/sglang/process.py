"""A server that runs as a child process and is ready when it answers: used for engines and for the router."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn, Self

import psutil

from rltrain.sglang.http import get_status

READY_TIMEOUT = 600.0  # seconds; imports alone take a minute on a busy machine
_PROBE_INTERVAL = 0.1


class ServerDiedError(RuntimeError):
    """The server's process ended by itself; the message says with which code."""


class ServerProcess:
    """`python -m module PARENT_PID`, with its settings as JSON on stdin (they hold a secret), and its URL.

    Must be started from the main thread: the kernel ends such a process with the thread that started it.
    """

    def __init__(self, module: str, settings: dict[str, Any], url: str) -> None:
        self.url = url
        self._module = module
        self._tmp = tempfile.TemporaryDirectory(
            prefix="slurmlime-"
        )  # for the sockets that SGLang leaves behind
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, str(os.getpid())],
            stdin=subprocess.PIPE,
            env={**os.environ, "TMPDIR": self._tmp.name},
        )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(json.dumps(settings).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def wait_until_ready(self, path: str = "/health", timeout: float = READY_TIMEOUT) -> None:
        """Probe `path` until it answers 200.

        Raises:
            ServerDiedError: the process ended before.
            TimeoutError: it did not answer within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._raise_died("while it started; its output is above")
            try:
                if get_status(self.url + path, timeout=5.0) == 200:
                    return
            except OSError:
                pass  # not listening yet
            time.sleep(_PROBE_INTERVAL)
        raise TimeoutError(f"{self._module} did not answer at {self.url}{path} within {timeout:.0f} s")

    def has_ended(self) -> bool:
        """Whether the process has ended by itself."""
        return self._process.poll() is not None

    def wait(self) -> NoReturn:
        """Wait for the process to end, which it should not do by itself.

        Raises:
            ServerDiedError: always, when it has ended.
        """
        self._process.wait()
        self._raise_died("while it served; its output is above")

    def stop(self) -> None:
        """Kill the process, which has nothing to save and takes seconds when asked. Its children end with it."""
        left_behind = _shared_memory_files(self.pid)
        self._process.kill()
        self._process.wait()
        for path in left_behind:
            path.unlink(missing_ok=True)
        self._tmp.cleanup()

    def _raise_died(self, when: str) -> NoReturn:
        code = self._process.returncode
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        raise ServerDiedError(f"{self._module} (pid {self.pid}) ended with {how} {when}")


def _shared_memory_files(pid: int) -> set[Path]:
    """Shared memory that SGLang's schedulers have made under names, and do not remove when they end."""
    try:
        processes = psutil.Process(pid).children(recursive=True)
        files = [Path(file.path) for process in processes for file in process.open_files()]
    except psutil.Error:
        return set()  # it has ended by itself, and took what it knew with it
    return {path for path in files if path.parent == Path("/dev/shm") and path.name.startswith("sglang_")}
