"""The process in charge of a sandbox: starts every daemon, obeys commands, and ends everything with it.

    python -m hpc.sandbox.server DIR OWNER_PID READY_FD

OWNER_PID (0 for none) is the process without which the sandbox must not go on. On READY_FD goes `ready`, or what
went wrong. Everything below this process ends with it, however it ends.
"""

from __future__ import annotations

import os
import pwd
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hpc.sandbox import control, programs, slurm_conf
from hpc.sandbox.daemons import DaemonError, Daemons
from hpc.sandbox.network import Network
from hpc.sandbox.packages import find_program, search_path
from hpc.sandbox.paths import SandboxPaths
from hpc.sandbox.spec import BACKUP, Addresses, ClusterSpec, choose_addresses
from hpc.slurm.client import without_slurm
from rltrain.run.errors import UserError
from rltrain.run.processes import become_subreaper, wait_readable

_REAP_SECONDS = 1.0


class SandboxServer:
    """One cluster, from boot to shutdown."""

    def __init__(self, layout: SandboxPaths, spec: ClusterSpec) -> None:
        self._layout, self._spec = layout, spec
        self._user = pwd.getpwuid(os.geteuid()).pw_name
        self._stopping = False
        self._addresses = choose_addresses(len(spec.node_names), spec.networks, spec.backup)
        self._network: Network | None = None
        env = without_slurm(os.environ) | {"SLURM_CONF": str(layout.slurm_conf), "PATH": search_path()}
        self._daemons = Daemons(layout.log, env)

    def boot(self) -> None:
        """Start all daemons; returns when every node is idle.

        Raises:
            DaemonError: one of them did not come up.
        """
        self._log("boot")
        programs.check_namespaces(self._daemons)
        if self._spec.accounting:
            programs.start_database(self._daemons, self._layout, self._user)
        self._write_config(self._addresses)
        if self._spec.networks:
            self._network = Network(self._daemons, self._addresses)
            self._network.make()
        self._start_munge()
        if self._spec.accounting:
            programs.start_slurmdbd(self._daemons, self._layout, self._addresses, self._user)
            self._log("slurmdbd answers")
        self._daemons.start("slurmctld", self._controller())
        if self._spec.backup:  # one that starts before the first answers would take over
            self._daemons.wait_until(self._answers, "slurmctld")
            self._daemons.start(BACKUP, programs.controller_command(self._layout, BACKUP, again=True))
        for name in self._spec.node_names:
            self._start_node(name)
        self._daemons.wait_until(self._all_idle, "idle nodes")
        self._log("every node is idle")

    def serve(self, listener: socket.socket, owner: int | None) -> None:
        """Do commands until one says stop, the owner (a pidfd) has ended, or slurmctld has."""
        watched = [listener.fileno()] + ([] if owner is None else [owner])
        while not self._stopping:
            readable = wait_readable(watched, _REAP_SECONDS)
            self._daemons.reap()
            if owner in readable:
                self._stop("the owner has ended")
            elif not any(map(self._daemons.is_running, ("slurmctld", BACKUP))):
                self._stop("slurmctld has ended")
            elif readable:
                control.answer(listener, self._handle)

    def shut_down(self) -> None:
        """End everything. No daemon needs to save anything: the next boot starts from nothing."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        left = self._daemons.kill_all()
        if self._network is not None:
            self._network.remove()
        self._layout.control_socket.unlink(missing_ok=True)
        self._log(f"down, processes left: {left}")

    def _handle(self, message: dict[str, Any]) -> None:
        match message["command"]:
            case "ping":
                pass
            case "stop":
                self._stop("asked to stop")
            case "power_off":
                self._daemons.kill(self._known(message["node"]))
            case "power_on":
                name = self._known(message["node"])
                if not self._daemons.is_running(name):
                    self._start_node(name)
            case "cut_off":
                self._wired().cut(self._index(message["node"]))
            case "join":
                self._wired().join(self._index(message["node"]))
            case "silence":
                self._daemons.send_signal("slurmctld", signal.SIGSTOP)
            case "speak":
                self._daemons.send_signal("slurmctld", signal.SIGCONT)
            case "kill_controller":
                if not self._daemons.is_running(BACKUP):
                    raise ValueError("this sandbox has no second slurmctld")
                self._daemons.terminate("slurmctld")
            case "restart_controller":
                if self._daemons.is_running("slurmctld"):
                    self._daemons.terminate("slurmctld")
                self._daemons.start("slurmctld", self._controller(again=True))
            case other:
                raise ValueError(f"unknown command {other!r}")

    def _controller(self, again: bool = False) -> list[str]:
        return programs.controller_command(self._layout, self._addresses.controller_name, again)

    def _start_node(self, name: str) -> None:
        if self._network is None:
            self._daemons.start(name, programs.node_command(name, self._layout))
            return
        index = self._index(name)
        self._daemons.start(name, programs.node_command(name, self._layout, self._addresses.node(index)))
        self._network.plug_in(index, self._daemons.pid(name))

    def _wired(self) -> Network:
        if self._network is None:
            raise ValueError("the nodes of this sandbox have no networks of their own")
        return self._network

    def _index(self, name: str) -> int:
        return self._spec.node_names.index(self._known(name))

    def _known(self, name: str) -> str:
        if name not in self._spec.node_names:
            raise ValueError(f"there is no node {name!r}, only {', '.join(self._spec.node_names)}")
        return name

    def _write_config(self, addresses: Addresses) -> None:
        layout, spec = self._layout, self._spec
        layout.slurm_conf.write_text(slurm_conf.slurm_conf(spec, addresses, layout, self._user))
        (layout.etc / "gres.conf").write_text(slurm_conf.gres_conf(spec, layout))
        (layout.etc / "hosts").write_text(slurm_conf.hosts_file(spec, addresses, socket.gethostname()))
        (layout.etc / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (layout.state / "slurmctld").mkdir()
        (layout.state / "dev").mkdir()
        for index in range(spec.gpus):
            (layout.state / "dev" / f"gpu{index}").symlink_to("/dev/null")

    def _start_munge(self) -> None:
        private = self._layout.state / "munge"
        private.mkdir(mode=0o700)
        key = private / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        layout = self._layout
        files = [f"--key-file={key}", f"--seed-file={private}/munged.seed", f"--socket={layout.munge_socket}"]
        files += [f"--pid-file={layout.run}/munged.pid", f"--log-file={layout.log}/munged.log"]
        # --force: munged dislikes log files and sockets in directories that others could rename, such as those in /tmp
        self._daemons.start(
            "munged", [find_program("munged"), "--foreground", "--force", "--num-threads=2", *files]
        )
        self._daemons.wait_until(layout.munge_socket.exists, "munged")

    def _answers(self) -> bool:
        try:
            self._daemons.run([find_program("sinfo"), "-h"])
        except DaemonError:
            return False
        return True

    def _all_idle(self) -> bool:
        try:
            listing = self._daemons.run([find_program("sinfo"), "-h", "-N", "-o", "%N %T"])
        except DaemonError:  # slurmctld does not answer yet
            return False
        states = dict(line.split() for line in listing.splitlines())
        return set(states) == set(self._spec.node_names) and set(states.values()) == {"idle"}

    def _stop(self, why: str) -> None:
        self._log(why)
        self._stopping = True

    def _log(self, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


class _Terminated(BaseException):
    """SIGTERM or SIGINT."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main() -> None:
    """Boot, tell whether that worked, serve, clean up."""
    root, owner_pid, ready_fd = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.set_inheritable(ready_fd, False)
    os.umask(0o022)  # other users are to read slurm.conf and to reach munge
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, 0)
    )  # jobs inherit it: a crash leaves no gigabytes where they ran
    become_subreaper()
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, _terminate)
    layout = SandboxPaths(root)
    server = SandboxServer(layout, ClusterSpec.from_json(layout.spec.read_text()))
    try:
        owner = os.pidfd_open(owner_pid) if owner_pid else None
        listener = control.listen(layout.control_socket)
        with os.fdopen(ready_fd, "w") as ready:
            try:
                server.boot()
                ready.write("ready")
            except (DaemonError, OSError, UserError, subprocess.SubprocessError) as problem:
                ready.write(str(problem))
                return
        server.serve(listener, owner)
    except (_Terminated, BrokenPipeError, ProcessLookupError):  # whoever wanted the sandbox has gone
        pass
    finally:
        server.shut_down()


if __name__ == "__main__":
    main()
