"""Clocks of nodes that jump: what the supervisor and the roles of a run take for the time of day.

A small library is loaded before theirs: with libfaketime `time.sleep` fails when the clock jumps. Slurm and munge keep
the right time: munge refuses a node that is five minutes off. So the library stays out of srun and scontrol, which the
supervisor starts, and a Python that loads it starts the roles.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from hpc.chaos.faults import NobodyError
from hpc.planning.slurm_tables import SlurmTables

_VARIABLE = "SLURMLIME_CHAOS_CLOCK"  # names the file that has the seconds by which the clock is wrong
CLOCK = "clock"
_FILE = f"/dev/shm/{CLOCK}"  # each node has its own /dev/shm
_SOURCE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

__attribute__((constructor)) static void stay_here(void) {
    if (!getenv("SLURMLIME_ROLE") && !strncmp(program_invocation_short_name, "python", 6)) unsetenv("LD_PRELOAD");
}

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


def that_can_jump(tables: SlurmTables, directory: Path) -> SlurmTables:
    """What makes a job's clocks able to jump; the tables as they are where nothing can be compiled.

    Args:
        tables: of the job.
        directory: that all nodes see; the library is made there.
    """
    env = variables(directory)
    if not env:
        return tables
    program = directory / "python-of-roles"
    if not program.exists():
        made = program.with_suffix(".new")
        words = f"LD_PRELOAD={shlex.quote(env['LD_PRELOAD'])} exec {shlex.quote(sys.executable)}"
        made.write_text(f'#!/bin/sh\n{words} "$@"\n')
        made.chmod(0o755)
        made.replace(program)
    return replace(tables, env={**tables.env, **env}, python=str(program))


def variables(directory: Path) -> dict[str, str]:
    """Environment of a process whose clock can jump; empty where nothing can be compiled.

    Args:
        directory: where the library is made.
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
