"""The processes of a sandbox: started with a log each, watched while others wait for them, ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rltrain.run.processes import descendants, dying_with_us, kill_descendants, wait_readable

_PROBE_SECONDS = 0.02
_KILL_SECONDS = 5.0
_TAIL_BYTES = 2000


class DaemonError(Exception):
    """A daemon ended, or did not become ready."""


class Daemons:
    """Children of this process by name. They die with it, even if it is killed."""

    def __init__(self, log_dir: Path, env: Mapping[str, str]) -> None:
        self.env = dict(env)
        self._log_dir = log_dir
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a daemon; what it prints goes to `NAME.out` in the log directory."""
        with (self._log_dir / f"{name}.out").open("ab") as out:
            self._running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.env,
                start_new_session=True,
                preexec_fn=dying_with_us(signal.SIGKILL),  # this process has one thread
            )

    def run(self, command: Sequence[str], timeout: float = 30.0) -> str:
        """Standard output of a command that ends by itself.

        Raises:
            DaemonError: it failed; the message has what it said.
        """
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise DaemonError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def wait_until(self, ready: Callable[[], bool], what: str, timeout: float = 30.0) -> None:
        """Probe until `ready()`.

        Raises:
            DaemonError: time is up, or a daemon has ended meanwhile.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            for name, process in self._running.items():
                if process.poll() is not None:
                    raise DaemonError(
                        f"{name} ended ({process.returncode}) while waiting for {what}{self._tail(name)}"
                    )
            if time.monotonic() > deadline:
                raise DaemonError(f"no sign of {what} after {timeout:.0f} s")
            time.sleep(_PROBE_SECONDS)

    def is_running(self, name: str) -> bool:
        """Whether a daemon was started and has not ended."""
        process = self._running.get(name)
        return process is not None and process.poll() is None

    def pid(self, name: str) -> int:
        """Id of a daemon's process."""
        return self._running[name].pid

    def send_signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a daemon."""
        self._running[name].send_signal(number)

    def terminate(self, name: str) -> None:
        """SIGTERM for a daemon, which saves what it has to; returns when it has ended, by SIGKILL if it takes long."""
        self.send_signal(name, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running[name].wait(_KILL_SECONDS)
        self.kill(name)

    def kill(self, name: str) -> None:
        """SIGKILL a daemon that takes its children with it; returns when all are gone."""
        process = self._running.pop(name, None)
        if process is None:
            return
        children = [fd for pid in descendants(process.pid) if (fd := _open_pid(pid)) is not None]
        process.kill()
        process.wait()
        for fd in children:
            wait_readable([fd], _KILL_SECONDS)
            os.close(fd)

    def reap(self) -> None:
        """Take the exit status of every child that has ended, orphans handed to this process among them."""
        own = {process.pid: process for process in self._running.values()}
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in own:
                    own[ended.si_pid].wait()
                else:
                    os.waitpid(ended.si_pid, 0)

    def kill_all(self) -> list[int]:
        """SIGKILL everything below this process; returns the ids of what did not go in time."""
        left = kill_descendants(os.getpid())
        self.reap()  # or they stay as zombies if process 1 is not an init
        return left

    def _tail(self, name: str) -> str:
        text = ""
        for path in (self._log_dir / f"{name}.out", self._log_dir / f"{name}.log"):
            if path.exists():
                text += path.read_text(errors="replace")[-_TAIL_BYTES:]
        return f":\n{text}" if text else ""


def _open_pid(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
