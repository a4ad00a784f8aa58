"""Flags of sbatch for each component of a job, and whether the cluster has what they ask for. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hpc.planning.nodes import Split
from hpc.planning.request import SubmitOptions
from hpc.planning.slurm_tables import Value
from hpc.slurm.cluster import ClusterFacts, NodeShape
from hpc.slurm.values import parse_duration
from rltrain.run.errors import UserError, nearest

_DEFAULT_GPUS = 8  # of a node, where the cluster can't be asked
_LEAST_START = 60.0  # seconds until the roles of a run that has not been measured are ready


@dataclass(frozen=True)
class Component:
    """A part of the job whose nodes are alike.

    Attributes:
        role: `trainer` or `rollout`, or `trainer` if all is on these nodes.
        gpus: of each node.
        gpu_type: None for any.
        sbatch: flags that only this component has.
        cpus: of each node.
    """

    role: str
    nodes: int
    gpus: int
    gpu_type: str | None
    partition: str | None
    cpus: int | None = None
    sbatch: Mapping[str, Value] = field(default_factory=dict)

    @property
    def gres(self) -> str:
        """The GPUs of a node as Slurm writes them."""
        return f"{self.gpu_type}:{self.gpus}" if self.gpu_type else str(self.gpus)

    def flags(self) -> dict[str, Value]:
        """Flags of sbatch for this component; those of the tables win."""
        flags: dict[str, Value] = {"partition": self.partition} if self.partition else {}
        flags |= {"nodes": str(self.nodes), "ntasks-per-node": "1"}
        if self.cpus:
            flags["cpus-per-task"] = str(self.cpus)
        if self.gpus:
            flags["gpus-per-node"] = self.gres
        return flags | dict(self.sbatch)


def node_gpus(options: SubmitOptions, facts: ClusterFacts | None, role: str, given: int | None) -> int:
    """GPUs of a node that a role may use: as given, or the most that a node of its partition has."""
    if given is not None:
        return given
    if facts is None:
        return _DEFAULT_GPUS
    partition = _partition(options, facts, role)
    return max((shape.num_gpus(_gpu_type(options, role)) for shape in facts.shapes(partition)), default=0)


def make_components(
    split: Split, options: SubmitOptions, facts: ClusterFacts | None
) -> tuple[Component, ...]:
    """The components of the job: one, or the trainer's and the engines' if it is heterogeneous.

    Args:
        split: who gets which nodes.
        options: partition, GPU type and tables.
        facts: the cluster, None if it can't be asked; then nothing is checked.

    Raises:
        UserError: the cluster can't give that; the message has the nearest that it can.
    """
    if split.layout == "het":
        wanted = [("trainer", split.trainer_nodes, split.trainer_gpus),
                  ("rollout", split.rollout_nodes, split.rollout_gpus)]  # fmt: skip
    else:
        gpus = max(split.trainer_gpus, split.first_rollout_gpu + split.rollout_gpus)
        wanted = [("trainer", split.nodes, gpus)]
    components = tuple(_component(*each, options, facts) for each in wanted)
    if facts is not None:
        _check(components, options, facts)
        _check_cpus(components[0], split.trainer_gpus, facts)
    return components


def _component(
    role: str, nodes: int, gpus: int, options: SubmitOptions, facts: ClusterFacts | None
) -> Component:
    flags = options.slurm.of_role(role)
    gpu_type = _gpu_type(options, role)
    flags.pop("gpu-type", None)
    if facts is None:
        partition = flags.get("partition", options.partition)
        return Component(role, nodes, gpus, gpu_type, str(partition) if partition else None, sbatch=flags)
    partition = _partition(options, facts, role)
    shapes = facts.shapes(partition)
    fitting = [shape for shape in shapes if shape.num_gpus(gpu_type) >= gpus]
    gpus = gpus if any(shape.gpus for shape in shapes) else 0  # ranks on a CPU are processes
    cpus = (
        None
        if "cpus-per-task" in flags
        else min((_cpu_share(shape, gpus) for shape in fitting), default=None)
    )
    return Component(role, nodes, gpus, gpu_type, partition, cpus, flags)


def _cpu_share(shape: NodeShape, gpus: int) -> int:
    """As many of a node's CPUs as of its GPUs."""
    return max(1, shape.cpus * gpus // shape.num_gpus()) if shape.num_gpus() and gpus else shape.cpus


def _partition(options: SubmitOptions, facts: ClusterFacts, role: str) -> str:
    name = options.slurm.of_role(role).get("partition", options.partition)
    if isinstance(name, str):
        return facts.partition(name).name
    default = facts.default_partition
    if default is None:
        raise UserError("this cluster has no default partition: give --partition.")
    return default.name


def _gpu_type(options: SubmitOptions, role: str) -> str | None:
    name = options.slurm.of_role(role).get("gpu-type", options.gpu_type)
    return str(name) if name else None


def _check(components: tuple[Component, ...], options: SubmitOptions, facts: ClusterFacts) -> None:
    _check_account(options, facts)
    for component in components:
        _check_gpu_type(component, facts)
        _check_time(component, options, facts)
    # Nodes are not shared between components, but their partitions may overlap. In one partition the sum says it all.
    alone = [(each,) for each in components]
    one_partition = len({each.partition for each in components}) == 1
    for chosen in [components, *alone] if one_partition else [*alone, components]:
        _check_nodes(chosen, facts)


def _check_account(options: SubmitOptions, facts: ClusterFacts) -> None:
    if options.account and facts.accounts is not None and options.account not in facts.accounts:
        near = nearest(options.account, facts.accounts)
        hint = f"did you mean {near}? " if near else ""
        known = ", ".join(facts.accounts) or "none"
        raise UserError(f"--account {options.account}: {hint}Accounts that you may charge: {known}.")


def _check_gpu_type(component: Component, facts: ClusterFacts) -> None:
    types = facts.gpu_types(component.partition or "")
    if component.gpu_type and component.gpu_type not in types:
        near = nearest(component.gpu_type, [kind for kind in types if kind])
        hint = f"Did you mean {near}? " if near else ""
        there = ", ".join(kind for kind in types if kind) or "none"
        raise UserError(
            f"--gpu-type {component.gpu_type}: partition {component.partition} has no such GPUs. {hint}It has: {there}."
        )


def _check_time(component: Component, options: SubmitOptions, facts: ClusterFacts) -> None:
    text = component.sbatch.get("time", options.time)
    limit = facts.partition(component.partition or "").max_time_s
    if text is None:
        return
    try:
        seconds = parse_duration(str(text))
    except ValueError:
        raise UserError(f"--time {text} is not a time limit. Give minutes, 4:00:00 or 2-00:00:00.") from None
    if limit is not None and (seconds is None or seconds > limit):
        raise UserError(
            f"--time {text}: partition {component.partition} allows at most {limit / 3600:.4g} hours;"
            " a longer run continues in the next job."
        )


def check_time_for_a_step(
    components: tuple[Component, ...], options: SubmitOptions, facts: ClusterFacts, lead: int, needed: float
) -> None:
    """Refuse a time limit within which no step can be done: the job would be requeued again and again.

    Args:
        lead: seconds before the limit at which the job is told to save.
        needed: seconds that the start of the roles and the slowest step have taken so far.
    """
    for component in components:
        text = component.sbatch.get("time", options.time)
        partition = facts.partition(component.partition or "")
        given = partition.default_time_s or partition.max_time_s
        limit = given if text is None else parse_duration(str(text))
        needed = max(needed, _LEAST_START)
        if limit is None or limit > lead + needed:
            continue
        least = math.ceil((lead + needed) / 60) + 1
        what = (
            f"the default time limit of partition {component.partition}" if text is None else f"--time {text}"
        )
        raise UserError(
            f"{what} leaves no time for a step: of its {limit / 60:.3g} min the last {lead / 60:.3g} are for saving,"
            f" and the start with one step takes about {needed / 60:.2g}. Give --time {least} or more."
        )


def _check_cpus(trainer: Component, ranks: int, facts: ClusterFacts) -> None:
    """Slurm starts a step only if each task has a CPU."""
    given = trainer.sbatch.get("cpus-per-task")
    cpus = int(given) if isinstance(given, str) and given.isdigit() else trainer.cpus
    if cpus is None or cpus >= ranks:
        return
    what = (
        f"cpus-per-task {given} is"
        if given
        else f"a node's share of CPUs in partition {trainer.partition} is {cpus},"
    )
    more = f" Give at least cpus-per-task {ranks}, or at" if given else " At"
    raise UserError(
        f"{what} less than the {ranks} ranks on each trainer node, which need a CPU each.{more} most"
        f" --actor-num-gpus-per-node {cpus}."
    )


def _check_nodes(components: tuple[Component, ...], facts: ClusterFacts) -> None:
    wanted = sum(component.nodes for component in components)
    usable = {name for component in components for name in _usable_nodes(component, facts)}
    if wanted <= len(usable):
        return
    who = " and ".join(dict.fromkeys(f"partition {component.partition}" for component in components))
    gpus = max(component.gpus for component in components)
    having = f" with {gpus} GPUs or more" if gpus else ""
    most = max(
        (shape.num_gpus(c.gpu_type) for c in components for shape in facts.shapes(c.partition or "")),
        default=0,
    )
    if gpus > most:
        raise UserError(f"{gpus} GPUs a node were asked for, but no node of {who} has more than {most}.")
    raise UserError(
        f"{wanted} nodes were asked for ({' + '.join(f'{c.nodes} {c.role}' for c in components)}), but {who} has"
        f" {len(usable)} usable nodes{having}. At most --nodes {len(usable)} is possible."
    )


def _usable_nodes(component: Component, facts: ClusterFacts) -> set[str]:
    members = set(facts.partition(component.partition or "").nodes)
    return {
        node.name
        for node in facts.nodes
        if node.name in members
        and node.is_usable
        and sum(n for kind, n in node.gpus.items() if component.gpu_type in (None, kind)) >= component.gpus
    }
