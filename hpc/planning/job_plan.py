"""The processes of a job and where they run: pure functions of the training flags and the split of nodes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hpc.planning.nodes import Split
from rltrain.arguments.config import Config
from rltrain.arguments.fleet import EngineSpec, engine_specs, models
from rltrain.run.errors import UserError

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
        """Names of the processes in logs and messages, for example `engine-0`."""
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
    def gpus(self) -> int | None:
        """How many of this machine's GPUs the processes see; None for a Slurm job, of which Slurm knows it."""
        if self.layout != "local":
            return None
        seen = {gpu for each in self.processes for gpu in each.env.get("CUDA_VISIBLE_DEVICES", "").split(",")}
        return len(seen - {""})

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles in each component of the job."""
        found: dict[int, list[str]] = {}
        for process in self.processes:
            component = found.setdefault(process.placement.component if process.placement else 0, [])
            if process.role not in component:
                component.append(process.role)
        return tuple("+".join(found[component]) for component in sorted(found))


def make_plan(config: Config, python: str = sys.executable, gpus: Sequence[str] = ()) -> JobPlan:
    """Plan a job on one machine from resolved training flags.

    Args:
        config: resolved.
        python: interpreter of the processes.
        gpus: the machine's, as CUDA_VISIBLE_DEVICES names them; none for a run on the CPU.

    Raises:
        UserError: the machine has GPUs, but fewer than the run needs.
    """
    engines = count_engines(config)
    processes = [
        *_single("router", count_routers(config), python),
        *_single("engine", engines, python),
        *_single("rollout", 1, python),
        *_main_processes(config, python),
    ]
    return JobPlan(tuple(_share_gpus(processes, config, gpus) if gpus else processes))


def _share_gpus(processes: Sequence[RoleProcess], config: Config, gpus: Sequence[str]) -> list[RoleProcess]:
    """Let each process see only its own GPUs. As in a Slurm job, all ranks of the trainer see all of the trainer's."""
    ranks = 0 if config.debug.debug_rollout_only else config.parallel.num_ranks
    for_engines = 0 if config.debug.debug_train_only else config.engines.rollout_num_gpus
    first = 0 if config.engines.colocate else ranks
    if max(ranks, first + for_engines) > len(gpus):
        raise UserError(
            f"This machine has {len(gpus)} GPUs to use ({','.join(gpus)}), and the run takes"
            f" {max(ranks, first + for_engines)}: {ranks} for trainer ranks, {for_engines} for engines. Lower"
            " --actor-num-gpus-per-node or --rollout-num-gpus, or let both share the GPUs with --colocate."
            " CUDA_VISIBLE_DEVICES= (empty) runs it on the CPU."
        )
    specs = engine_specs(config)

    def seen(process: RoleProcess) -> Sequence[str]:
        if process.role == "engine":
            begin = first + specs[process.index].first_gpu
            return gpus[begin : begin + specs[process.index].num_gpus]
        return gpus[:ranks] if process.role == MAIN_ROLE else ()

    return [
        replace(each, env={**each.env, "CUDA_VISIBLE_DEVICES": ",".join(seen(each))}) for each in processes
    ]


def make_slurm_plan(config: Config, split: Split, python: str = sys.executable) -> JobPlan:
    """Plan a Slurm job. Router and rollout process are on the first node of the engines; each engine is a step of
    its own, also one that spans nodes, the trainer's ranks are one."""
    component, first_node = (1, 0) if split.layout == "het" else (0, split.first_rollout_node)
    service = Placement(component, (first_node,))
    processes = [_place("router", index, python, service) for index in range(count_routers(config))]
    for index, spec in enumerate(engine_specs(config)):
        nodes, gpus = engine_place(spec, split)
        where = Placement(component, tuple(first_node + node for node in nodes), gpus=gpus)
        argv, count = _argv("engine", python), len(nodes)
        processes.append(RoleProcess("engine", index, argv, count=count, spans=count > 1, placement=where))
    processes.append(_place("rollout", 0, python, service))
    if config.debug.debug_rollout_only:
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


def count_engines(config: Config) -> int:
    """Number of engines that the flags ask for."""
    return len(engine_specs(config))


def count_routers(config: Config) -> int:
    """Number of routers that the job starts: one a model, unless somebody else has started one."""
    return 0 if config.debug.debug_train_only or config.engines.sglang_router_ip else len(models(config))


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


def _main_processes(config: Config, python: str) -> list[RoleProcess]:
    """The trainer's ranks, or the process that replaces them."""
    if config.debug.debug_rollout_only:
        return [RoleProcess(MAIN_ROLE, 0, _rollout_only(python))]
    return _ranks(config.parallel.num_ranks, python)


def _rollout_only(python: str) -> tuple[str, ...]:
    return (python, "-m", "rltrain.rollout_only")


def _ranks(count: int, python: str) -> list[RoleProcess]:
    argv = _argv(MAIN_ROLE, python)
    return [RoleProcess(MAIN_ROLE, rank, argv, rank_env(rank, count, rank, count)) for rank in range(count)]


def _place(role: str, index: int, python: str, placement: Placement) -> RoleProcess:
    return RoleProcess(role, index, _argv(role, python), placement=placement)


def _argv(role: str, python: str) -> tuple[str, ...]:
    return (python, "-m", _PROGRAMS[role])
