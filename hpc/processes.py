"""Linux process control: die with the parent, find and end what a process has left behind.

A role may start processes of its own (SGLang starts a scheduler and a detokenizer) and those may leave its
process group. Two kernel facilities keep them in reach: the parent-death signal, and the child subreaper,
to which orphans below it are handed so that they stay its descendants.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Loaded now: between fork and exec only a plain C call is safe in a process that has threads.
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(death_signal: signal.Signals) -> Callable[[], None]:
    """A `preexec_fn` for a child that gets `death_signal` when the calling thread's process dies.

    The kernel watches the *thread* that forks: call `Popen` in one that lives as long as the process.
    """
    parent, number = os.getpid(), int(death_signal)

    def arm() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os.kill(os.getpid(), signal.SIGKILL)

    return arm


def become_subreaper() -> None:
    """Orphans below this process become its children, not those of init."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
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


def send_signal(pid: int, number: signal.Signals) -> None:
    """Signal a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def signal_group(leader: int, number: signal.Signals) -> None:
    """Signal the process group of `leader`, which may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)
