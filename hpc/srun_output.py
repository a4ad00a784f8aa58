"""What srun says of the tasks that failed, and of nodes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# srun: error: node4: task 3: Exited with exit code 3 | node3: tasks 0-1: Killed | Node failure on node5
_EXITED = re.compile(
    r"^srun: error: (\S+): tasks? (\d+)[^:]*: (?:Exited with exit code (\d+)|(.+))", re.MULTILINE
)
_NODE_FAILED = re.compile(r"[Nn]ode failure on (\S+)")
_SIGNALS = {"Killed": 9, "Terminated": 15, "Segmentation fault": 11, "Aborted": 6, "Bus error": 7,
            "User defined signal 1": 10, "User defined signal 2": 12}  # fmt: skip


@dataclass(frozen=True)
class TaskExit:
    """How a task of a step ended."""

    node: str
    task: int
    code: int


def parse_exits(text: str) -> list[TaskExit]:
    """Tasks that srun says have failed, in order. The code of one that a signal ended is minus the signal."""
    return [
        TaskExit(
            match[1], int(match[2]), int(match[3]) if match[3] else -_SIGNALS.get(match[4].split(" (")[0], 1)
        )
        for match in _EXITED.finditer(text)
    ]


def failed_nodes(log_dir: Path) -> list[str]:
    """Nodes of which srun said that they failed."""
    return failed_nodes_in("".join(path.read_text(errors="replace") for path in log_dir.glob("srun-*.log")))


def failed_nodes_in(text: str) -> list[str]:
    """The same, from what it said."""
    return list(dict.fromkeys(node.rstrip(".,") for node in _NODE_FAILED.findall(text)))
