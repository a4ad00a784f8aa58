"""Start the processes of a job: the `Launcher` protocol, and its implementation for one machine."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from hpc import processes
from hpc.plan import RoleProcess


class Handle(Protocol):
    """A process that was started."""

    @property
    def pid(self) -> int:
        """Its id on this machine."""

    def poll(self) -> int | None:
        """Its exit code (minus the signal's number if a signal ended it), or None while it runs."""

    def terminate(self) -> None:
        """Ask it, and what it started, to end."""

    def kill(self) -> None:
        """End it, and what it started, now."""


class Launcher(Protocol):
    """Starts processes of a job and leaves none behind. `close` comes last and ends what is left."""

    def start(self, process: RoleProcess, env: Mapping[str, str], log: Path) -> Handle:
        """Start with exactly the environment `env`; both output streams are appended to `log`."""

    def close(self) -> list[int]:
        """End every process that is left, however it hid; returns the ids that would not go."""


class LocalLauncher:
    """Subprocesses of this process, each in a session of its own.

    They die with this process even if it is killed with SIGKILL. Call `start` from a thread that lives as
    long as the job, see `processes.die_with_parent`.
    """

    def __init__(self) -> None:
        processes.become_subreaper()

    def start(self, process: RoleProcess, env: Mapping[str, str], log: Path) -> Handle:
        """See `Launcher`."""
        with log.open("ab") as output:
            return _LocalHandle(
                subprocess.Popen(
                    process.argv,
                    env={**env, **process.env},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=processes.die_with_parent(signal.SIGKILL),
                )
            )

    def close(self) -> list[int]:
        """See `Launcher`."""
        return processes.kill_descendants(os.getpid())


class _LocalHandle:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # Once the leader is reaped its number may be another process's; `Launcher.close` gets the rest.
        if self._process.poll() is None:
            processes.signal_group(self._process.pid, number)
