"""The facts of a cluster that a plan needs: partitions, the kinds of nodes in them, accounts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hpc.slurm.partitions import Node, Partition
from rltrain.run.errors import UserError, nearest


@dataclass(frozen=True)
class NodeShape:
    """Nodes of a partition that are alike.

    Attributes:
        count: how many jobs can use, now or later.
        idle: how many of those a job could have entirely now.
        cpus, memory_mb: of one node.
        gpus: GPUs of one node as pairs of type ("" for none) and number.
        features: for `--constraint`.
    """

    count: int
    idle: int
    cpus: int
    memory_mb: int
    gpus: tuple[tuple[str, int], ...]
    features: tuple[str, ...]

    def num_gpus(self, gpu_type: str | None = None) -> int:
        """GPUs of one node, of one type or of all."""
        return sum(count for kind, count in self.gpus if gpu_type in (None, kind))


@dataclass(frozen=True)
class ClusterFacts:
    """A cluster at one moment.

    Attributes:
        preempt_type: `preempt/partition_prio`, `preempt/qos`, `preempt/none`.
        job_requeue: whether jobs may be requeued unless they say otherwise.
        kill_wait_s: between SIGTERM and SIGKILL of a job that is ended.
        has_accounting: whether sacct works.
        accounts: those this user may charge; None if Slurm does not check it.
    """

    name: str
    version: str
    partitions: tuple[Partition, ...]
    nodes: tuple[Node, ...]
    preempt_type: str
    job_requeue: bool
    kill_wait_s: float
    has_accounting: bool
    accounts: tuple[str, ...] | None

    @property
    def default_partition(self) -> Partition | None:
        """The partition of jobs that name none."""
        return next((partition for partition in self.partitions if partition.is_default), None)

    def partition(self, name: str) -> Partition:
        """A partition by name.

        Raises:
            UserError: there is none; the message has the nearest names.
        """
        by_name = {partition.name: partition for partition in self.partitions}
        if name not in by_name:
            near = nearest(name, by_name)
            hint = f"Did you mean {near}? " if near else ""
            raise UserError(f"there is no partition {name!r}. {hint}There are: {', '.join(by_name)}.")
        return by_name[name]

    def shapes(self, partition: str) -> tuple[NodeShape, ...]:
        """The kinds of usable nodes in a partition, the most numerous first."""
        members = set(self.partition(partition).nodes)
        usable = [node for node in self.nodes if node.name in members and node.is_usable]
        count = Counter(_kind(node) for node in usable)
        idle = Counter(_kind(node) for node in usable if node.is_idle)
        return tuple(NodeShape(number, idle[kind], *kind) for kind, number in count.most_common())

    def gpu_types(self, partition: str) -> list[str]:
        """Types of GPUs in a partition, "" for those without one."""
        return sorted({kind for shape in self.shapes(partition) for kind, _ in shape.gpus})

    def nodes_with(self, partition: str, gpus: int = 0, gpu_type: str | None = None) -> int:
        """Number of usable nodes of a partition that have at least `gpus` GPUs (of a type) each."""
        return sum(shape.count for shape in self.shapes(partition) if shape.num_gpus(gpu_type) >= gpus)

    def preemption(self, partition: str) -> str:
        """The effect of preemption on its jobs: OFF, REQUEUE, CANCEL, SUSPEND; UNKNOWN if a QOS decides."""
        own = self.partition(partition)
        if self.preempt_type == "preempt/none":
            return "OFF"
        if self.preempt_type != "preempt/partition_prio":
            return "UNKNOWN"
        rivals = (other for other in self.partitions if set(other.nodes) & set(own.nodes))
        higher = any(other.priority_tier > own.priority_tier for other in rivals)
        return own.preempt_mode.split(",")[0] if higher else "OFF"


def _kind(node: Node) -> tuple[int, int, tuple[tuple[str, int], ...], tuple[str, ...]]:
    return node.cpus, node.memory_mb, tuple(sorted(node.gpus.items())), node.features
