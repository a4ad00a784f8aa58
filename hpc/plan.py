"""Which processes a job consists of and where they run: pure functions of the training flags and the split of nodes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from hpc.split import Split
from rltrain.arguments.errors import UserError
from rltrain.arguments.fleet import EngineSpec, engine_specs, models

MAIN_ROLE = "trainer"

_PROGRAMS = {
    "router": "rltrain.sglang.router",
    "engine": "rltrain.sglang.engine",
    "rollout": "rltrain.rollout",
    MAIN_ROLE: "rltrain.train",
}


@dataclass(frozen=True)
class Placement:
    """Where the tasks of a role run.

    Attributes:
        component: number of the heterogeneous job's component; 0 in other jobs.
        nodes: positions in the component's list of nodes.
        tasks_per_node: on each of them.
        gpus: the first GPU and the number of GPUs on each node that these tasks share; None to see none.
    """

    component: int
    nodes: tuple[int, ...]
    tasks_per_node: int = 1
    gpus: tuple[int, int] | None = None


@dataclass(frozen=True)
class RoleProcess:
    """One process of the job, or several that are started together and end together.

    Attributes:
        index: of the first process.
        env: on top of what every role gets.
        count: number of processes.
        spans: whether they are the parts of one engine, a node each.
        placement: None on this machine.
    """

    role: str
    index: int
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    count: int = 1
    spans: bool = False
    placement: Placement | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """How logs and messages call the processes, for example `engine-0`."""
        if self.spans:
            first = f"{self.role}-{self.index}"
            return (first, *(f"{first}.node{i}" for i in range(1, self.count)))
        return tuple(f"{self.role}-{self.index + i}" for i in range(self.count))

    @property
    def name(self) -> str:
        """All of them in one word."""
        if self.count == 1 or self.spans:
            return self.names[0]
        return f"{self.role}-[{self.index}-{self.index + self.count - 1}]"

    def index_of(self, name: str) -> int:
        """Index of the process, or engine, that has this name."""
        return self.index + (self.names.index(name) if name in self.names and not self.spans else 0)


@dataclass(frozen=True)
class JobPlan:
    """The processes of a job. The run is over when its trainers are.

    Attributes:
        layout: `local`, or where a Slurm job has its processes: `het`, `plain`, `colocated`.
    """

    processes: tuple[RoleProcess, ...]
    layout: str = "local"

    @property
    def roles(self) -> tuple[str, ...]:
        """What runs in each component of the job."""
        found: dict[int, list[str]] = {}
        for process in self.processes:
            component = found.setdefault(process.placement.component if process.placement else 0, [])
            if process.role not in component:
                component.append(process.role)
        return tuple("+".join(found[component]) for component in sorted(found))


def make_plan(args: argparse.Namespace, python: str = sys.executable) -> JobPlan:
    """Plan a job on one machine from resolved training flags."""
    engines = count_engines(args)
    processes = [
        *_single("router", count_routers(args), python),
        *_single("engine", engines, python),
        *_single("rollout", 1, python),
        *_main_processes(args, python),
    ]
    return JobPlan(tuple(processes))


def make_slurm_plan(args: argparse.Namespace, split: Split, python: str = sys.executable) -> JobPlan:
    """Plan a Slurm job. Router and rollout process are on the first node of the engines; each engine is a step of
    its own, also one that spans nodes, the trainer's ranks are one."""
    component, first_node = (1, 0) if split.layout == "het" else (0, split.first_rollout_node)
    service = Placement(component, (first_node,))
    processes = [_place("router", index, python, service) for index in range(count_routers(args))]
    for index, spec in enumerate(engine_specs(args)):
        nodes, gpus = engine_place(spec, split)
        where = Placement(component, tuple(first_node + node for node in nodes), gpus=gpus)
        argv, count = _argv("engine", python), len(nodes)
        processes.append(RoleProcess("engine", index, argv, count=count, spans=count > 1, placement=where))
    processes.append(_place("rollout", 0, python, service))
    if args.debug_rollout_only:
        processes.append(RoleProcess(MAIN_ROLE, 0, _rollout_only(python), placement=service))
        return JobPlan(tuple(processes), split.layout)
    per_node = split.trainer_gpus
    ranks = Placement(0, tuple(range(split.trainer_nodes)), per_node, (0, per_node))
    count = split.trainer_nodes * per_node
    processes.append(RoleProcess(MAIN_ROLE, 0, _argv(MAIN_ROLE, python), count=count, placement=ranks))
    return JobPlan(tuple(processes), split.layout)


def engine_place(spec: EngineSpec, split: Split) -> tuple[range, tuple[int, int]]:
    """Nodes of an engine, counted from the engines' first, and its first GPU and number of GPUs on each of them.

    Raises:
        UserError: it would begin on one node and end on another, although a node has room for it.
    """
    node, slot = divmod(spec.first_gpu, split.rollout_gpus)
    on_node = min(spec.num_gpus, split.rollout_gpus)
    if slot + on_node > split.rollout_gpus or spec.num_gpus % on_node:
        raise UserError(
            f"--sglang-config: an engine of {spec.num_gpus} GPUs would begin at GPU {slot} of a node that has"
            f" {split.rollout_gpus} GPUs for engines, and not end there. Put large groups first, or fill the node with"
            " a group of worker_type placeholder."
        )
    return range(node, node + spec.num_gpus // on_node), (split.first_rollout_gpu + slot, on_node)


def count_engines(args: argparse.Namespace) -> int:
    """Number of engines that the flags ask for."""
    return len(engine_specs(args))


def count_routers(args: argparse.Namespace) -> int:
    """Number of routers that the job starts: one a model, unless somebody else has started one."""
    return 0 if args.debug_train_only or args.sglang_router_ip else len(models(args))


def rank_env(rank: int, world_size: int, local_rank: int, local_world_size: int) -> dict[str, str]:
    """The variables by which a rank of torch.distributed knows its place."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
    }


def _single(role: str, count: int, python: str) -> list[RoleProcess]:
    return [RoleProcess(role, index, _argv(role, python)) for index in range(count)]


def _main_processes(args: argparse.Namespace, python: str) -> list[RoleProcess]:
    """The trainer's ranks, or what is in their place."""
    if args.debug_rollout_only:
        return [RoleProcess(MAIN_ROLE, 0, _rollout_only(python))]
    return _ranks(args.actor_num_nodes * args.actor_num_gpus_per_node, python)


def _rollout_only(python: str) -> tuple[str, ...]:
    return (python, "-m", "rltrain.rollout_only")


def _ranks(count: int, python: str) -> list[RoleProcess]:
    argv = _argv(MAIN_ROLE, python)
    return [RoleProcess(MAIN_ROLE, rank, argv, rank_env(rank, count, rank, count)) for rank in range(count)]


def _place(role: str, index: int, python: str, placement: Placement) -> RoleProcess:
    return RoleProcess(role, index, _argv(role, python), placement=placement)


def _argv(role: str, python: str) -> tuple[str, ...]:
    return (python, "-m", _PROGRAMS[role])
