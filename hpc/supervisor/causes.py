"""Why a role ended: the code, the cluster, or unknown. Pure functions of its exit code and of srun's output.

Only the code fails in the same way again. What Slurm did, and a SIGKILL that was not for memory, are tried again.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from enum import StrEnum

from rltrain.run.errors import EXIT_NO_SUPERVISOR

# srun: error: node4: task 3: Exited with exit code 3 | node3: tasks 0-1: Killed | node1: task 0: Out Of Memory
_EXITED = re.compile(
    r"^srun: error: (\S+): tasks? (\d+)[^:]*: (?:Exited with exit code (\d+)|(.+))", re.MULTILINE
)
_NODE_FAILED = re.compile(r"[Nn]ode failure on (\S+)")
_OUT_OF_MEMORY = re.compile(r"oom.kill|Out Of Memory|OOM Killed", re.IGNORECASE)
# No task has begun: the same step may be created later.
_REFUSED = re.compile(
    r"^srun: error: ((?:Unable to create step|Unable to confirm allocation).*)", re.MULTILINE
)
_NOT_LAUNCHED = re.compile(r"^srun: error: ((?:Task launch|Application launch) .*failed.*)", re.MULTILINE)
_GIVEN_UP = re.compile(r"^srun: error: (Timed out waiting for job step to complete)", re.MULTILINE)
_SIGNALS = {"Killed": 9, "Out Of Memory": 9, "Terminated": 15, "Segmentation fault": 11, "Aborted": 6, "Bus error": 7,
            "User defined signal 1": 10, "User defined signal 2": 12}  # fmt: skip
_NOT_ITS_OWN = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, EXIT_NO_SUPERVISOR)


class Cause(StrEnum):
    """Whose failure it was."""

    CODE = "code"  # it would fail in the same way
    CLUSTER = "cluster"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class End:
    """How a role ended.

    Attributes:
        reason: more than the exit code says; empty if there is no more.
        is_refused: Slurm did not start it, so that nothing of it has run.
    """

    cause: Cause
    reason: str = ""
    is_refused: bool = False


@dataclass(frozen=True)
class TaskExit:
    """How a task of a step ended."""

    node: str
    task: int
    code: int


def end_of_process(code: int, out_of_memory: bool | None) -> End:
    """Why a process ended.

    Args:
        code: exit code, or minus the signal that ended it.
        out_of_memory: whether the out-of-memory killer ended it; None if unknown.
    """
    if code == -signal.SIGKILL and out_of_memory is not None:
        if out_of_memory:
            return End(Cause.CODE, "out of memory")
        return End(Cause.UNKNOWN, "not for memory")
    return End(Cause.UNKNOWN if code in _NOT_ITS_OWN else Cause.CODE)


def end_of_step(said: str, code: int) -> End:
    """Why a step ended.

    Args:
        said: by srun and by slurmstepd.
        code: of the first task that failed; if none did, srun's own.
    """
    if nodes := failed_nodes_in(said):
        return End(Cause.CLUSTER, f"node {nodes[0]} failed")
    if match := _REFUSED.search(said):
        return End(Cause.CLUSTER, f"Slurm did not start it: {match[1].strip()}", is_refused=True)
    if match := _NOT_LAUNCHED.search(said):
        return End(Cause.CLUSTER, f"Slurm could not start it: {match[1].strip()}")
    if parse_exits(said):
        return end_of_process(code, True if _OUT_OF_MEMORY.search(said) else None)
    if match := _GIVEN_UP.search(said):
        return End(Cause.UNKNOWN, f"Slurm gave up on its step: {match[1]}")
    # Without a task that failed it is srun that was ended, or did not like its flags.
    return End(Cause.UNKNOWN if code <= 0 else Cause.CODE)


def parse_exits(text: str) -> list[TaskExit]:
    """Tasks that srun says have failed, in order. The code of one that a signal ended is minus the signal."""
    return [
        TaskExit(
            match[1], int(match[2]), int(match[3]) if match[3] else -_SIGNALS.get(match[4].split(" (")[0], 1)
        )
        for match in _EXITED.finditer(text)
    ]


def failed_nodes_in(text: str) -> list[str]:
    """Nodes that failed, from what srun said."""
    return list(dict.fromkeys(node.rstrip(".,") for node in _NODE_FAILED.findall(text)))
