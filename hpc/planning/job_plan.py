"""The processes of a job and where they run: pure functions of the training flags and the split of nodes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from hpc.planning.nodes import Split
from hpc.planning.processes import MAIN_ROLE, JobPlan, Placement, RoleProcess
from rltrain.arguments.config import Config
from rltrain.arguments.fleet import EngineSpec, count_models, engine_specs
from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.run.errors import UserError

_PROGRAMS = {
    "router": "rltrain.sglang.router",
    "engine": "rltrain.sglang.engine",
    "rollout": "rltrain.rollout",
    MAIN_ROLE: "rltrain.train",
}


def make_plan(config: Config, python: str = sys.executable, gpus: Sequence[str] = ()) -> JobPlan:
    """Plan a job on one machine from resolved training flags.

    Args:
        config: resolved.
        python: interpreter of the processes.
        gpus: the machine's, as CUDA_VISIBLE_DEVICES names them; none for a run on the CPU.

    Raises:
        UserError: the machine has GPUs, but fewer than the run needs.
    """
    engines, debug = config.engines, config.debug
    rollout_only = RoleProcess(MAIN_ROLE, 0, _rollout_only(python))
    processes = [
        *_single("router", count_routers(engines, debug), python),
        *_single("engine", len(engine_specs(engines, debug)), python),
        *_single("rollout", 1, python),
        *([rollout_only] if debug.debug_rollout_only else _ranks(config.parallel.num_ranks, python)),
    ]
    return JobPlan(tuple(_share_gpus(processes, config, gpus) if gpus else processes))


def _share_gpus(processes: Sequence[RoleProcess], config: Config, gpus: Sequence[str]) -> list[RoleProcess]:
    """Let each process see only its own GPUs. As in a Slurm job, all ranks of the trainer see all of the trainer's."""
    ranks = 0 if config.debug.debug_rollout_only else config.parallel.num_ranks
    for_engines = 0 if config.debug.debug_train_only else config.engines.rollout_num_gpus
    first = 0 if config.engines.colocate else ranks
    if max(ranks, first + for_engines) > len(gpus):
        raise UserError(
            f"This machine has {len(gpus)} usable GPUs ({','.join(gpus)}), and the run takes"
            f" {max(ranks, first + for_engines)}: {ranks} for trainer ranks, {for_engines} for engines. Lower"
            " --actor-num-gpus-per-node or --rollout-num-gpus, or let both share the GPUs with --colocate."
            " CUDA_VISIBLE_DEVICES= (empty) runs it on the CPU."
        )
    specs = engine_specs(config.engines, config.debug)

    def seen(process: RoleProcess) -> Sequence[str]:
        if process.role == "engine":
            begin = first + specs[process.index].first_gpu
            return gpus[begin : begin + specs[process.index].num_gpus]
        return gpus[:ranks] if process.role == MAIN_ROLE else ()

    return [
        replace(each, env={**each.env, "CUDA_VISIBLE_DEVICES": ",".join(seen(each))}) for each in processes
    ]


def make_slurm_plan(engines: Engines, debug: Debug, split: Split, python: str = sys.executable) -> JobPlan:
    """Plan a Slurm job. Router and rollout process are on the first node of the engines; each engine is a step of
    its own, also one that spans nodes, the trainer's ranks are one."""
    component, first_node = (1, 0) if split.layout == "het" else (0, split.first_rollout_node)
    service = Placement(component, (first_node,))
    processes = [_place("router", index, python, service) for index in range(count_routers(engines, debug))]
    for index, spec in enumerate(engine_specs(engines, debug)):
        nodes, gpus = engine_place(spec, split)
        where = Placement(component, tuple(first_node + node for node in nodes), gpus=gpus)
        argv, count = _argv("engine", python), len(nodes)
        processes.append(RoleProcess("engine", index, argv, count=count, spans=count > 1, placement=where))
    processes.append(_place("rollout", 0, python, service))
    if debug.debug_rollout_only:
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
            f"--sglang-config: an engine of {spec.num_gpus} GPUs would begin at GPU {slot} of a node with"
            f" {split.rollout_gpus} GPUs for engines, and not fit on it. Put large groups first, or fill the node with"
            " a group of worker_type placeholder."
        )
    return range(node, node + spec.num_gpus // on_node), (split.first_rollout_gpu + slot, on_node)


def count_routers(engines: Engines, debug: Debug) -> int:
    """Number of routers that the job starts: one a model, unless somebody else has started one."""
    return 0 if debug.debug_train_only or engines.sglang_router_ip else count_models(engines)


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


def _rollout_only(python: str) -> tuple[str, ...]:
    return (python, "-m", "rltrain.rollout_only")


def _ranks(count: int, python: str) -> list[RoleProcess]:
    argv = _argv(MAIN_ROLE, python)
    return [RoleProcess(MAIN_ROLE, rank, argv, rank_env(rank, count, rank, count)) for rank in range(count)]


def _place(role: str, index: int, python: str, placement: Placement) -> RoleProcess:
    return RoleProcess(role, index, _argv(role, python), placement=placement)


def _argv(role: str, python: str) -> tuple[str, ...]:
    return (python, "-m", _PROGRAMS[role])
