"""Start the processes of a job: the `Launcher` protocol, and its implementation for one machine."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from hpc.planning.processes import RoleProcess
from hpc.supervisor.causes import End, end_of_process
from rltrain.run import processes


class Handle(Protocol):
    """A process that was started."""

    @property
    def pid(self) -> int:
        """Its id on this machine."""

    def poll(self) -> int | None:
        """Its exit code (minus the signal's number if a signal ended it), or None while it runs.

        Of several processes that were started together, the code of the first that failed.
        """

    def has_ended(self) -> bool:
        """True when none of its processes runs any more."""

    def lost_a_node(self) -> bool:
        """Whether its machine has failed, so that starting it there again is of no use."""

    def end(self) -> End:
        """Why it ended, once `poll` has a code."""

    def failed_log(self) -> Path:
        """Where to look for the reason of a failure."""

    def terminate(self) -> None:
        """Ask it, and what it started, to end."""

    def kill(self) -> None:
        """End it, and what it started, now."""


class Launcher(Protocol):
    """Starts processes of a job and leaves none behind. `close` comes last and ends what is left."""

    def start(self, process: RoleProcess, env: Mapping[str, str], log_dir: Path) -> Handle:
        """Start with the environment `env`; the output is appended to `NAME.log` in `log_dir`."""

    def start_canary(self, env: Mapping[str, str], log_dir: Path) -> Handle | None:
        """A process that only shows whether a signal reaches the others and not us; None where that can't happen."""

    def close(self) -> list[int]:
        """End every process that is left, even a hidden one; returns the ids of those that did not end."""


class LocalLauncher:
    """Subprocesses of this process, each in a session of its own.

    They die with this process even if it is killed with SIGKILL. Call `start` from a thread that lives as
    long as the job, see `processes.dying_with_us`.
    """

    def __init__(self) -> None:
        processes.become_subreaper()

    def start(self, process: RoleProcess, env: Mapping[str, str], log_dir: Path) -> Handle:
        """See `Launcher`."""
        log = log_dir / f"{process.name}.log"
        with log.open("ab") as output:
            started = subprocess.Popen(
                process.argv,
                env={**env, **process.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=processes.dying_with_us(signal.SIGKILL),
            )
        return _LocalHandle(started, log)

    def start_canary(self, env: Mapping[str, str], log_dir: Path) -> Handle | None:
        """See `Launcher`."""
        return None

    def close(self) -> list[int]:
        """See `Launcher`."""
        return processes.kill_descendants(os.getpid())


class _LocalHandle:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log
        self._oom_kills = processes.oom_kills()  # before this one's

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def lost_a_node(self) -> bool:
        return False

    def end(self) -> End:
        kills = processes.oom_kills()
        known = None if kills is None or self._oom_kills is None else kills > self._oom_kills
        return end_of_process(self._process.poll() or 0, known)

    def failed_log(self) -> Path:
        return self._log

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # Once the leader is reaped its number may be another process's; `Launcher.close` gets the rest.
        if self._process.poll() is None:
            processes.signal_group(self._process.pid, number)
