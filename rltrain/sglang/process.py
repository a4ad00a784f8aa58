"""A server that runs as a child process and is ready when it answers, and the roles that watch one: engine, router."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

from rltrain.run.errors import EXIT_NEVER_RESTART, run_main
from rltrain.run.http import get_status
from rltrain.run.lifeline import end_without_supervisor
from rltrain.run.processes import dying_with_us
from rltrain.run.role import RoleContext
from rltrain.sglang.health import HungError
from rltrain.sglang.leftovers import NodeDirectory

READY_TIMEOUT = 600.0  # seconds; imports alone take a minute on a busy machine
_PROBE_INTERVAL = 0.1
# Threads that wait for another would keep their cores busy, and where other processes work too, that one has none.
# OpenMP reads it when it is loaded, so the process must begin with it.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


class ServerDiedError(RuntimeError):
    """The server's process ended by itself; the message says with which code."""


class ExpelledError(RuntimeError):
    """The trainer could not give the engine its weights; the message says why."""


class ServerProcess:
    """`python -m module`, with its settings as JSON on stdin (they hold a secret), and its URL.

    Must be started from the main thread: the kernel ends such a process with the thread that started it.
    """

    def __init__(self, module: str, settings: dict[str, Any], url: str) -> None:
        self.url = url
        self._module = module
        self._directory = NodeDirectory()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module],
            stdin=subprocess.PIPE,
            env={
                **_WAITING,
                **os.environ,
                **_home(self._directory.path),
                "TMPDIR": str(self._directory.path),
            },
            preexec_fn=partial(_prepare, dying_with_us(signal.SIGKILL)),
        )
        assert self._process.stdin is not None
        # If it has ended already, `wait_until_ready` says so.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
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
                    self._directory.note_shared_memory(self.pid)
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
        self._directory.note_shared_memory(self.pid)
        self._process.kill()
        self._process.wait()
        self._directory.remove()

    def _raise_died(self, when: str) -> NoReturn:
        code = self._process.returncode
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        raise ServerDiedError(f"{self._module} (pid {self.pid}) ended with {how} {when}")


def _home(instead: Path) -> dict[str, str]:
    """`HOME` for a server whose user's home directory can't be written: SGLang and torch keep caches below it."""
    home = Path.home()
    return {} if home.is_dir() and os.access(home, os.W_OK | os.X_OK) else {"HOME": str(instead)}


def _prepare(die_with_role: Callable[[], None]) -> None:
    """In a server, before its program: SIGUSR1 reaches every process of a step, and is for the role, which ends it."""
    die_with_role()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def run_server_role(main: Callable[[RoleContext], None]) -> None:
    """Run `main` as this process: exit 0 when told to stop, 93 on bad input, 1 when the server died.

    On Slurm SIGTERM is an announcement that is blocked (`hpc/supervisor/task.py`); there SIGUSR1 says it.
    """
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGUSR1, _stop)

    def run_role() -> None:
        context = RoleContext.from_env()
        end_without_supervisor(context)
        main(context)

    def run() -> int:
        return run_main(run_role, EXIT_NEVER_RESTART)

    sys.exit(run_main(run, 1, (ServerDiedError, HungError, ExpelledError, TimeoutError)))


def _stop(signum: int, frame: FrameType | None) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the clean-up must not be interrupted by a second one
    sys.exit(0)
