"""Processes and ports: end with the parent, find and end what a process has left behind, reserve a port.

A role may start processes of its own (SGLang starts a scheduler and a detokenizer) and those may leave its
process group. Two kernel facilities keep them in reach: the parent-death signal, and the child subreaper,
to which orphans below it are handed so that they stay its descendants.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol


class HasFileno(Protocol):
    """A file, a socket, a pipe."""

    def fileno(self) -> int:
        """Its descriptor."""


_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_PR_SET_CHILD_SUBREAPER = 36
# Loaded now: between fork and exec only a plain C call is safe in a process that has threads. Linux only.
_prctl: Any = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)


def die_with_parent(parent: int, death_signal: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send `death_signal` to this process when its parent dies, however it dies.

    Linux only, else nothing is done.

    Args:
        parent: process id of the parent, told by itself: it may be dead by now.
        death_signal: what this process gets then.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def dying_with_us(death_signal: signal.Signals) -> Callable[[], None]:
    """A `preexec_fn` for a child that gets `death_signal` when the calling thread's process dies.

    The kernel watches the *thread* that forks: call `Popen` in one that lives as long as the process.
    """
    return partial(die_with_parent, os.getpid(), death_signal)


def become_subreaper() -> None:
    """Orphans below this process become its children, not init's."""
    if _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def parse_stat(text: str) -> tuple[int, int, str]:
    """Process id, parent's id and state letter from the text of `/proc/PID/stat`.

    The command name stands in parentheses and may itself hold spaces and parentheses.
    """
    head, _, tail = text.rpartition(")")
    state, parent = tail.split()[:2]
    return int(head.partition(" ")[0]), int(parent), state


def descendants(root: int) -> list[int]:
    """Ids of the living processes below `root` (zombies left out, but not what is below them)."""
    children: dict[int, list[int]] = {}
    living: set[int] = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent, state = parse_stat(path.read_text(errors="replace"))
        except (OSError, ValueError):  # it ended while we looked
            continue
        children.setdefault(parent, []).append(pid)
        if state not in "ZX":
            living.add(pid)
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        todo += below
        found += below
    return [pid for pid in found if pid in living]


def kill_descendants(root: int, timeout: float = 5.0) -> list[int]:
    """SIGKILL everything below `root` until nothing is left; returns the ids that did not go in time."""
    deadline = time.monotonic() + timeout
    while left := descendants(root):
        for pid in left:
            send_signal(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return left


def oom_kills(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many processes of this one's cgroup the out-of-memory killer has ended so far; None if that can't be read.

    Args:
        proc: which groups this process is in, as cgroups(7) has it.
        mount: where cgroups of version 2 are mounted, or those of version 1, each in a directory of its own.
    """
    try:
        groups = proc.read_text().splitlines()
    except OSError:
        return None
    for line in groups:
        _, controllers, path = line.split(":", 2)
        is_v2, own = not controllers, path.lstrip("/")
        if not is_v2 and "memory" not in controllers.split(","):
            continue
        root = mount if is_v2 else mount / "memory"
        file = root / own / ("memory.events" if is_v2 else "memory.oom_control")
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split() for line in file.read_text().splitlines())
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return None


def send_signal(pid: int, number: signal.Signals) -> None:
    """Signal a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def signal_group(leader: int, number: signal.Signals) -> None:
    """Signal the process group of `leader`, which may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


def family_of(host: str) -> socket.AddressFamily:
    """The family of an address without brackets; of a name, IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def reserve_port(host: str, wanted: int = 0) -> socket.socket:
    """A socket that is bound to a free port of `host`, to `wanted` if that is free, and never listens.

    While it is open no process gets the port by chance, and a server that sets SO_REUSEADDR, as servers do,
    can still bind to it.
    """
    sock = socket.socket(family_of(host), socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, wanted))
    except OSError:
        sock.bind((host, 0))
    return sock


def way_to(host: str, port: int = 9) -> str:
    """The address of this machine from which it reaches another: only looks up the route, and sends nothing."""
    with socket.socket(family_of(host), socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]


def wait_readable(files: Iterable[int | HasFileno], timeout: float) -> list[int]:
    """The descriptors of files that can be read, or of processes that have ended, within `timeout` seconds.

    `select.select` takes no descriptor above 1023.
    """
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(max(0.0, timeout) * 1000)]
