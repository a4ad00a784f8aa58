"""The cluster: does Slurm answer, can the partition run the job, and may something end it early?"""

from __future__ import annotations

import re

from hpc.doctor.check import Check, fail, ok, warn
from hpc.doctor.memory_fit import GIB, Memory
from hpc.slurm.client import SlurmClient, SlurmError
from hpc.slurm.cluster import ClusterFacts, NodeShape
from hpc.slurm.facts import read_facts
from rltrain.run.errors import UserError

# GiB, from the maker's data sheets. For a type that is sold in two sizes, the smaller one.
_GPU_GIB = {
    "v100": 16, "p100": 16, "t4": 16, "a10": 24, "a30": 24, "l4": 24, "a40": 48, "l40": 48, "l40s": 48, "a6000": 48,
    "a100": 40, "h100": 80, "h800": 80, "h20": 96, "gh200": 96, "h200": 141, "b200": 180, "gb200": 186, "mi250x": 128,
    "mi300x": 192,
}  # fmt: skip


def ask_cluster(client: SlurmClient) -> tuple[ClusterFacts | None, Check]:
    """The cluster's facts, or None if Slurm does not answer, and a check that says so."""
    try:
        facts = read_facts(client)
    except SlurmError as error:
        return None, fail("slurm", str(error))
    accounting = "with" if facts.has_accounting else "without"
    text = f"cluster {facts.name}, Slurm {facts.version}, {len(facts.nodes)} nodes, {accounting} accounting"
    return facts, ok("slurm", text)


def check_partition(
    facts: ClusterFacts, name: str, nodes: int, gpus: int, gpu_type: str | None
) -> list[Check]:
    """Checks of a partition.

    Args:
        nodes: that the job takes.
        gpus: that it takes of each; 0 for none, or if that follows from the partition.
        gpu_type: None for any.
    """
    try:
        partition = facts.partition(name)
    except UserError as error:
        return [fail("partition", str(error))]
    if partition.state != "UP":
        return [
            fail(
                "partition", f"{name} is {partition.state}: its jobs do not start", "ask the site, or another"
            )
        ]
    return [_check_nodes(facts, name, nodes, gpus, gpu_type), check_interruptions(facts, name)]


def _check_nodes(facts: ClusterFacts, name: str, nodes: int, gpus: int, gpu_type: str | None) -> Check:
    shapes = facts.shapes(name)
    there = "; ".join(_describe_shape(shape) for shape in shapes) or "no node that jobs can use"
    needs_gpus = gpus if any(shape.gpus for shape in shapes) else 0
    fitting = facts.nodes_with(name, needs_gpus, gpu_type)
    text = f"{name} has {there}"
    if fitting < nodes:
        wanted = f"{nodes} nodes" + (
            f" with {needs_gpus} {gpu_type or ''} GPUs".replace("  ", " ") if gpus else ""
        )
        return fail(
            "partition", f"{text}; the job needs {wanted}", f"at most --nodes {fitting} is possible there"
        )
    limit = facts.partition(name).max_time_s
    return ok("partition", f"{text}; time limit {'none' if limit is None else f'{limit / 3600:.4g} h'}")


def check_interruptions(facts: ClusterFacts, name: str) -> Check:
    """Check whether other jobs may end ours, and whether it then continues by itself."""
    mode = facts.preemption(name)
    grace = facts.partition(name).grace_s
    if mode == "CANCEL":
        return warn("preemption", f"a job in {name} that makes way is cancelled, not requeued",
                    "`python -m hpc.resubmit RUN --chain N` submits spare jobs that continue the run")  # fmt: skip
    if mode in ("REQUEUE", "UNKNOWN"):
        until = f"after {grace} s of grace" if grace else "without grace"
        return ok("preemption", f"jobs in {name} may have to make way {until}; they are requeued and resume")
    return ok("preemption", f"jobs in {name} are not preempted" if mode == "OFF" else f"mode {mode}")


def partition_memory(facts: ClusterFacts, name: str, gpu_type: str | None) -> Memory | None:
    """Memory of the smallest GPU of a partition, of its nodes if none has one; None if its type says nothing."""
    shapes = facts.shapes(name)
    types = {kind for shape in shapes for kind, _ in shape.gpus if gpu_type in (None, kind)}
    if not types:
        smallest = min((shape.memory_mb for shape in shapes), default=None)
        return None if smallest is None else Memory(smallest * 1024.0**2, False, f"a node of {name}")
    sizes = [(gpu_memory_gib(kind), kind) for kind in types]
    known = [(size, kind) for size, kind in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    size, kind = min(known)
    return Memory(size * GIB, True, f"a GPU of type {kind} ({size} GiB)")


def gpu_memory_gib(kind: str) -> int | None:
    """Memory of a GPU from what a site calls its type, such as `nvidia_a100-sxm4-80gb`; None if that says nothing."""
    text = kind.lower()
    if match := re.search(r"(\d+)\s*gi?b", text):
        return int(match[1])
    names = re.split(r"[^a-z0-9]+", text)
    return next((_GPU_GIB[name] for name in names if name in _GPU_GIB), None)


def _describe_shape(shape: NodeShape) -> str:
    gpus = " + ".join(f"{count} {kind or 'GPU'}" for kind, count in shape.gpus) or "no GPU"
    return f"{shape.count} × ({gpus}, {shape.cpus} CPUs, {shape.memory_mb / 1024:.0f} GiB), {shape.idle} idle"
