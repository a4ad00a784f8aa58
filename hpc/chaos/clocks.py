"""Clocks of nodes that jump: what the processes of a run take for the time of day.

A small library is loaded before theirs: with libfaketime `time.sleep` fails when the clock jumps. Slurm and munge keep
the right time: munge refuses a node that is five minutes off.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from hpc.chaos.faults import NobodyError

_VARIABLE = "SLURMLIME_CHAOS_CLOCK"  # names the file that has the seconds by which the clock is wrong
_FILE = "/dev/shm/clock"  # each node has its own /dev/shm
_SOURCE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long wrong(void) {
    int before = errno;
    char text[32] = "";
    const char *path = getenv("SLURMLIME_CHAOS_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        if (read(fd, text, sizeof text - 1) < 0) text[0] = 0;
        close(fd);
    }
    errno = before;
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += wrong();
    return failed;
}

int gettimeofday(void *now, void *zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    long *seconds = now;
    seconds[0] = exact.tv_sec;
    seconds[1] = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}
"""


def variables(directory: Path) -> dict[str, str]:
    """Environment of a job whose clocks can jump; empty where nothing can be compiled.

    Args:
        directory: that all nodes see; the library is made there.
    """
    compiler, library = shutil.which("gcc"), directory / "clock.so"
    if compiler is None:
        return {}
    if not library.exists():
        made = library.with_suffix(".new")
        command = [compiler, "-O1", "-shared", "-fPIC", "-fno-builtin", "-o", str(made), "-x", "c", "-"]
        if subprocess.run(command, input=_SOURCE, text=True).returncode:  # gcc says why
            return {}
        made.replace(library)
    return {"LD_PRELOAD": str(library), _VARIABLE: _FILE}


def jump(node: str, environments: Iterable[tuple[int, Mapping[str, str]]], hours: int) -> Callable[[], None]:
    """Let a node's clock jump; returns what sets it right again, even if the node has lost its power since.

    Args:
        node: its name.
        environments: id and environment of processes, some of which are to be on the node.
        hours: ahead.

    Raises:
        NobodyError: no process is there whose clock can jump.
    """
    for pid, env in environments:
        if env.get("SLURMD_NODENAME") != node or _VARIABLE not in env:
            continue
        with contextlib.suppress(OSError):  # it has just ended
            file = open(f"/proc/{pid}/root{_FILE}", "w")  # noqa: PTH123, SIM115 – `mend` closes it
            break
    else:
        raise NobodyError(
            f"nobody on {node} has a clock that can jump: it takes a run that is under way, and gcc"
        )
    file.write(f"{3600 * hours}")
    file.flush()

    def mend() -> None:
        with file:
            file.truncate(0)

    return mend
