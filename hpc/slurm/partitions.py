"""Partitions and nodes, as `scontrol show … -o` prints them."""

from __future__ import annotations

from dataclasses import dataclass

from hpc.slurm import values
from hpc.slurm.nodelist import expand

# Words in a node's state (`IDLE+DRAIN`, `DOWN*`) that mean: no job will start there until somebody acts.
_UNUSABLE = {
    *(
        "DOWN",
        "DRAIN",
        "DRAINED",
        "DRAINING",
        "FAIL",
        "FAILING",
        "MAINT",
        "FUTURE",
        "UNKNOWN",
        "NOT_RESPONDING",
    ),
    *("INVAL", "INVALID_REG", "ERROR"),
}


@dataclass(frozen=True)
class Partition:
    """A partition.

    Attributes:
        max_time_s, default_time_s: None for no limit, and for no default.
        max_nodes: of one job; None for no limit.
        priority_tier: with preemption by partition, jobs of a lower tier make way for those of a higher one.
        preempt_mode: OFF, REQUEUE, CANCEL, SUSPEND …: what becomes of its jobs when they are preempted.
        grace_s: time between the first signal and the kill of a preempted job.
        allow_accounts, allow_qos: None if all may use it.
    """

    name: str
    nodes: tuple[str, ...]
    is_default: bool
    state: str
    max_time_s: float | None
    default_time_s: float | None
    min_nodes: int
    max_nodes: int | None
    priority_tier: int
    preempt_mode: str
    grace_s: int
    allow_accounts: tuple[str, ...] | None
    allow_qos: tuple[str, ...] | None


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        state: Slurm's words, such as `IDLE+DRAIN`; `*` after it: it does not answer.
        cpus: that jobs can use.
        gpus: by type, "" for those without one.
        cpus_used, memory_used_mb, gpus_used: held by jobs now.
        features: for `--constraint`.
    """

    name: str
    state: str
    reason: str | None
    partitions: tuple[str, ...]
    cpus: int
    memory_mb: int
    gpus: dict[str, int]
    cpus_used: int
    memory_used_mb: int
    gpus_used: dict[str, int]
    features: tuple[str, ...]
    address: str

    @property
    def is_usable(self) -> bool:
        """Whether jobs start there, now or when others have ended."""
        words = {word.strip("*~#!%$@^-") for word in self.state.upper().split("+")}
        return not words & _UNUSABLE and "*" not in self.state

    @property
    def is_idle(self) -> bool:
        """Whether a job could have all of it now."""
        return self.is_usable and not self.cpus_used and not any(self.gpus_used.values())

    @property
    def num_gpus(self) -> int:
        """GPUs of all types."""
        return sum(self.gpus.values())


def parse_partitions(text: str) -> list[Partition]:
    """Output of `scontrol show partition -o`."""
    return [
        _partition(values.parse_key_values(line)) for line in text.splitlines() if "PartitionName=" in line
    ]


def parse_nodes(text: str) -> list[Node]:
    """Output of `scontrol show node -o -d`."""
    return [_node(values.parse_key_values(line)) for line in text.splitlines() if "NodeName=" in line]


def parse_config(text: str) -> dict[str, str]:
    """Output of `scontrol show config`: `Key   = value` lines."""
    pairs = (line.partition("=") for line in text.splitlines() if " = " in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _partition(fields: dict[str, str]) -> Partition:
    return Partition(
        name=fields["PartitionName"],
        nodes=tuple(expand(fields.get("Nodes", ""))),
        is_default=fields.get("Default") == "YES",
        state=fields.get("State", "UP"),
        max_time_s=values.parse_duration(fields.get("MaxTime", "")),
        default_time_s=values.parse_duration(fields.get("DefaultTime", "")),
        min_nodes=int(fields.get("MinNodes", 0)),
        max_nodes=int(fields["MaxNodes"]) if fields.get("MaxNodes", "").isdigit() else None,
        priority_tier=int(fields.get("PriorityTier", 1)),
        preempt_mode=fields.get("PreemptMode", "OFF"),
        grace_s=int(fields.get("GraceTime", 0)),
        allow_accounts=_allowed(fields.get("AllowAccounts", "ALL")),
        allow_qos=_allowed(fields.get("AllowQos", "ALL")),
    )


def _allowed(text: str) -> tuple[str, ...] | None:
    return None if text.upper() in ("ALL", "N/A", "") else tuple(text.split(","))


def _node(fields: dict[str, str]) -> Node:
    return Node(
        name=fields["NodeName"],
        state=fields["State"],
        reason=values.text_or_none(fields.get("Reason", "")),
        partitions=tuple(_words(fields.get("Partitions", ""))),
        cpus=int(fields.get("CPUEfctv") or fields["CPUTot"]),
        memory_mb=int(fields["RealMemory"]),
        gpus=values.gpus_of_gres(fields.get("Gres", "")),
        cpus_used=int(fields.get("CPUAlloc", 0)),
        memory_used_mb=int(fields.get("AllocMem", 0)),
        gpus_used=values.gpus_of_gres(fields.get("GresUsed", "")),
        features=tuple(_words(fields.get("ActiveFeatures", ""))),
        address=fields.get("NodeAddr", fields["NodeName"]),
    )


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if values.text_or_none(word)]
