"""The processes of `pytest -n N` are forked from one that has imported what most test modules do.

Each process collects all tests, so each would import torch, Megatron-core and more for itself: five of its first seven
seconds. xdist starts a process by a command that speaks on standard input and output. Here that is
`python tests/forked_workers.py ADDRESS -u -c CODE`, which hands its descriptors and the code to the process that forks,
and ends when the fork has.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

MODULES = (
    "rltrain.megatron.actor",
    "transformers.models.auto.modeling_auto",
    "analysis",
    "hpc.submitting.executor",
    "aiohttp",
    "hypothesis",
    "matplotlib.pyplot",
    "nbclient",
    "pyarrow.parquet",
    "pytest",
)


class Source:
    """The process that the others are forked from. It ends with this one."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="workers-")  # of this user alone, and the address with it
        address = f"{self._directory}/address"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(address)
            server.listen()  # who connects before all is imported waits
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(server.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[server.fileno()],
            )
        self.command = f"{sys.executable} -I -S {__file__} {address}"

    def close(self) -> None:
        """Wait until it has ended, as its forks have."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._directory)


Forks = dict[
    int, tuple[int, socket.socket]
]  # by a descriptor that says that it has ended: itself, and its command


def serve(server: socket.socket) -> str:
    """Fork for each command, and return what to run in the fork alone; end when nobody can ask for more."""
    forks: Forks = {}
    while True:
        commands = {connection: pid for pid, connection in forks.values()}
        ready, _, _ = select.select([server, sys.stdin, *forks, *commands], [], [])
        if sys.stdin in ready:
            os._exit(0)  # its forks see the same, and end by themselves
        for connection in commands.keys() & ready:
            os.kill(commands[connection], signal.SIGKILL)  # as xdist has killed the command
        for each in forks.keys() & ready:
            pid, connection = forks.pop(each)
            os.waitpid(pid, 0)
            os.close(each)
            connection.close()
        if server in ready and (code := fork(server, forks)) is not None:
            return code


def fork(server: socket.socket, forks: Forks) -> str | None:
    """A process for a command, in which this returns the code; it has the command's descriptors and none of ours."""
    connection, _ = server.accept()
    code, given, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    if pid := os.fork():
        forks[os.pidfd_open(pid)] = pid, connection
    else:
        for number, each in enumerate(given):
            os.dup2(each, number)
        for own, (_, other) in forks.items():
            os.close(own)
            other.close()
        connection.close()
        server.close()
    for each in given:
        os.close(each)
    return None if pid else code.decode()


def become(code: str) -> None:
    """What `python -u -c CODE` does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["-c"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(code, vars(sys.modules["__main__"]))


def command(address: str, code: str) -> None:
    """Stand for the fork, for as long as it is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the fork has got it, too
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [code.encode()], [0, 1, 2])
        connection.recv(1)


def main() -> None:
    """Be the command, or the process that forks."""
    if len(sys.argv) > 2:
        command(sys.argv[1], sys.argv[-1])
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    gc.disable()
    with warnings.catch_warnings(action="ignore"):
        for name in MODULES:
            importlib.import_module(name)
    gc.freeze()
    gc.enable()
    become(serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
