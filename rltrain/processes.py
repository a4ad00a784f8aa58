"""Small facts about processes and ports that every role needs. Standard library only."""

from __future__ import annotations

import ctypes
import os
import signal
import socket

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies. Linux only, else a no-op.

    Args:
        parent: process id of the parent, told by itself: it may be dead by now.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def reserve_port(host: str, wanted: int = 0) -> socket.socket:
    """A socket that is bound to a free port of `host`, to `wanted` if that is free, and never listens.

    While it is open nobody is given the port by chance, and a server that sets SO_REUSEADDR, as servers do,
    can still bind to it.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, wanted))
    except OSError:
        sock.bind((host, 0))
    return sock
