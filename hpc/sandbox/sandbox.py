"""The handle on a sandbox: start it, use it, break it, stop it."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpc.sandbox import control
from hpc.sandbox.packages import require_packages
from hpc.sandbox.paths import SandboxPaths
from hpc.sandbox.spec import ClusterSpec
from hpc.slurm.client import without_slurm
from rltrain.run.errors import UserError
from rltrain.run.processes import wait_readable

_MAX_SOCKET_PATH = 107  # bytes, of the kernel's struct sockaddr_un
_LOG_BYTES = 4000


class Sandbox:
    """A cluster in a directory; as a context manager it is up inside the block.

    Args:
        directory: made if it is missing; otherwise empty or a sandbox's. What an earlier cluster left is removed.
            For jobs of other users it must be readable by them.
        spec: shape of the cluster that `up` starts.
        owner_pid: when this process ends, however, the cluster goes down. None: it stays up until `down`.
    """

    def __init__(
        self, directory: str | Path, spec: ClusterSpec | None = None, owner_pid: int | None = None
    ) -> None:
        self._layout = SandboxPaths(Path(directory).resolve())
        self._spec = spec or ClusterSpec()
        self._owner_pid = owner_pid
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sandbox:
        self.up()
        return self

    def __exit__(self, *exception: object) -> None:
        self.down()

    @property
    def spec(self) -> ClusterSpec:
        """The cluster's shape."""
        return self._spec

    @property
    def directory(self) -> Path:
        """Everything of the cluster is below it."""
        return self._layout.root

    @property
    def env(self) -> dict[str, str]:
        """This process's environment with `variables`, and without any other of Slurm's."""
        return without_slurm(os.environ) | self.variables

    @property
    def variables(self) -> dict[str, str]:
        """Environment of a command that uses the cluster.

        SLURM_CONF names it. The nodes say that they have many cores, but they share this machine's: a job whose
        every process starts a thread a core would wait for itself.
        """
        return {
            "SLURM_CONF": str(self._layout.slurm_conf),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }

    @property
    def is_up(self) -> bool:
        """Whether the process in charge listens."""
        try:
            control.Connection(self._layout.control_socket).__exit__()
        except control.NotRunningError:
            return False
        return True

    def up(self, timeout: float = 90.0) -> None:
        """Start the cluster; returns when every node is idle.

        Raises:
            MissingPackagesError: Slurm is not installed; the message says how to.
            UserError: the directory can't be used, or the cluster did not come up: the message has the log's end.
        """
        self._check_directory()
        require_packages(self._spec.accounting)
        _make_directories(self._layout)
        self._layout.spec.write_text(self._spec.to_json())
        reading, writing = os.pipe()
        try:
            server = self._server = self._start_server(writing)
        finally:
            os.close(writing)
        with os.fdopen(reading) as answer:
            said = answer.read() if wait_readable([answer], timeout) else f"not up after {timeout:.0f} s"
        if said != "ready":
            server.terminate()
            server.wait()
            raise UserError(
                f"the sandbox did not come up: {said or self._log_tail()} Logs: {self._layout.log}"
            )

    def down(self, timeout: float = 30.0) -> None:
        """Stop the cluster and everything that runs on it; returns when no process is left. Logs stay."""
        try:
            connection = control.Connection(self._layout.control_socket)
        except control.NotRunningError:
            return
        with connection:
            server = os.pidfd_open(connection.server_pid)
            try:
                connection.request("stop")
                if not wait_readable([server], timeout):
                    signal.pidfd_send_signal(server, signal.SIGKILL)  # its children are told to die with it
            finally:
                os.close(server)
        if self._server:
            self._server.wait()

    def run(self, *command: str, user: str | None = None, env: Mapping[str, str] | None = None) -> str:
        """Standard output of a command run on the machine as on a login node, as another user if root wants it.

        Raises:
            subprocess.CalledProcessError: it failed; its notes have what it wrote to standard error.
        """
        if user is None:
            whole = {**self.env, **(env or {})}
            done = subprocess.run(command, env=whole, capture_output=True, text=True)
        else:  # another user gets only what is needed to find programs and the cluster: HOME and the like are ours
            whole = {**self.variables, "PATH": self.env["PATH"], **(env or {})}
            group = pwd.getpwnam(user).pw_gid
            done = subprocess.run(
                command, env=whole, user=user, group=group, extra_groups=[], capture_output=True, text=True
            )
        if done.returncode:
            error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
            error.add_note(done.stderr.strip())
            raise error
        return done.stdout

    def power_off(self, node: str, notice: bool = True) -> None:
        """Cut a node's power: all its processes get SIGKILL at once.

        By itself slurmctld notices after some 25 s. With `notice` it is told, so that what follows from it (the job is
        requeued or fails) follows now.
        """
        self._request("power_off", node=node)
        for _ in range(_TELLS if notice else 0):
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power_off")
            if self._state(node).partition(" ")[0] not in _USABLE:
                break

    def power_on(self, node: str, timeout: float = 30.0) -> None:
        """Start a node again; returns when jobs may run on it. One that was drained, too, for whatever reason.

        Raises:
            TimeoutError: slurmctld does not take it back; the message has the state and the reason.
        """
        self._request("power_on", node=node)
        deadline = time.monotonic() + timeout
        while (state := self._state(node)).partition(" ")[0] not in _USABLE:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{node} is not usable {timeout:.0f} s after it was powered on: it is {state}"
                )
            if state.startswith("drain"):
                with suppress(subprocess.CalledProcessError):  # somebody else has just resumed it
                    self.run("scontrol", "update", f"nodename={node}", "state=resume")
            time.sleep(0.05)

    def _state(self, node: str) -> str:
        return self.run("sinfo", "-h", "-n", node, "-o", "%T (%E)").strip()

    def cut_off(self, node: str) -> None:
        """Cut a node off from the network, until `join`; takes `ClusterSpec.networks`."""
        self._request("cut_off", node=node)

    def join(self, node: str) -> None:
        """Mend what `cut_off` has cut."""
        self._request("join", node=node)

    def silence(self) -> None:
        """Stop slurmctld from answering, as if it were overloaded, until `speak`."""
        self._request("silence")

    def speak(self) -> None:
        """Have slurmctld go on after `silence`."""
        self._request("speak")

    def fail_over(self, timeout: float = 60.0) -> None:
        """Kill the first slurmctld and have the second take over; takes `ClusterSpec.backup`. Returns when it answers.

        `restart_controller` brings the first one back, which takes over again.

        Raises:
            TimeoutError: it does not.
        """
        self._request("kill_controller")
        deadline = time.monotonic() + timeout
        for command in (["scontrol", "takeover"], ["squeue", "-h"]):
            while subprocess.run(command, env=self.env, capture_output=True).returncode:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the second slurmctld has not taken over after {timeout:.0f} s")
                time.sleep(0.05)

    def restart_controller(self, timeout: float = 60.0) -> None:
        """Kill slurmctld and start it again: it knows its jobs from its files. Returns when it answers.

        Raises:
            TimeoutError: it does not.
        """
        self._request("restart_controller")
        deadline = time.monotonic() + timeout
        while not self._answers():
            if time.monotonic() > deadline:
                raise TimeoutError(f"slurmctld does not answer {timeout:.0f} s after it was started again")
            time.sleep(0.05)

    def _answers(self) -> bool:
        return subprocess.run(["scontrol", "ping"], env=self.env, capture_output=True).returncode == 0

    def _request(self, command: str, **arguments: Any) -> None:
        with control.Connection(self._layout.control_socket) as connection:
            connection.request(command, **arguments)

    def _start_server(self, ready_fd: int) -> subprocess.Popen[bytes]:
        words = [str(self._layout.root), str(self._owner_pid or 0), str(ready_fd)]
        with (self._layout.log / "sandbox.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "hpc.sandbox.server", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[ready_fd],
            )

    def _check_directory(self) -> None:
        root = self._layout.root
        if not re.fullmatch(r"[\w./-]+", str(root), re.ASCII):
            raise UserError(
                f"{root}: slurm.conf can't hold this path. Use only letters, digits and . _ - in it."
            )
        if len(bytes(self._layout.database_socket)) > _MAX_SOCKET_PATH:
            raise UserError(f"{root} is too long a path for the sockets in it. Use a shorter one.")
        if root.is_relative_to("/dev/shm"):
            raise UserError(f"{root}: the nodes have a /dev/shm of their own and would not see it.")
        if self.is_up:
            raise UserError(f"a sandbox is up in {root} already. Stop it: python -m hpc.sandbox down {root}")
        if root.exists() and not self._layout.spec.exists() and any(root.iterdir()):
            raise UserError(f"{root} is not empty and does not belong to a sandbox. Give another directory.")

    def _log_tail(self) -> str:
        return (self._layout.log / "sandbox.log").read_text(errors="replace")[-_LOG_BYTES:]


_USABLE = {"idle", "mixed", "allocated", "completing"}
_TELLS = 20  # what a node said before its end may reach slurmctld after this, which then takes the node back


def _make_directories(layout: SandboxPaths) -> None:
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        for path in (layout.etc, layout.run, layout.log, layout.state):
            if path.exists():
                shutil.rmtree(path)
            path.mkdir()
            path.chmod(0o755)  # whatever the umask: other users' jobs read it
    except OSError as error:
        raise UserError(
            f"{error.filename} can't be written: {error.strerror}. Give another directory."
        ) from None
