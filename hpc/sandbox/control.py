"""The protocol between a sandbox's user and the process in charge: one JSON object per line over a Unix socket.

{"command": "power_off", "node": "node2"}  →  {"error": null}
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rltrain.run.errors import UserError

_MAX_BYTES = 4096
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid


class NotRunningError(UserError):
    """No sandbox is up in this directory."""


def listen(path: Path) -> socket.socket:
    """A listening socket that only this user can connect to."""
    listener = socket.socket(socket.AF_UNIX)
    path.unlink(missing_ok=True)
    old = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(old)
    listener.listen()
    return listener


def answer(listener: socket.socket, handle: Callable[[dict[str, Any]], None]) -> None:
    """Take one command from a socket that is ready, and do it; an error goes back as text."""
    connection, _ = listener.accept()
    with connection, contextlib.suppress(OSError):  # whoever asked may have gone
        connection.settimeout(5.0)
        error = None
        try:
            handle(json.loads(connection.recv(_MAX_BYTES)))
        except Exception as problem:
            error = str(problem)
        connection.sendall(json.dumps({"error": error}).encode() + b"\n")


class Connection:
    """A client's side, for one command.

    Raises:
        NotRunningError: nobody listens there.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise NotRunningError(f"no sandbox is up in {path.parent.parent}.") from None

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    @property
    def server_pid(self) -> int:
        """The process that listens, as the kernel knows it."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(credentials)[0])

    def request(self, command: str, timeout: float = 30.0, **arguments: Any) -> None:
        """Send a command and wait until it is done.

        Raises:
            UserError: it was refused or failed.
        """
        self._socket.settimeout(timeout)
        self._socket.sendall(json.dumps({"command": command, **arguments}).encode())
        reply = self._socket.makefile().readline()
        error = json.loads(reply)["error"] if reply else "the sandbox ended before it answered"
        if error:
            raise UserError(f"{command}: {error}")
