"""All checks of the doctor, in the order in which things would go wrong."""

from __future__ import annotations

import argparse

from hpc import config, run_dir
from hpc import flags as flag_data
from hpc.config import Request, SubmitOptions
from hpc.doctor import cluster, machine, memory, memory_fit, packages, probe, storage
from hpc.doctor.check import Check, fail, ok, warn
from hpc.doctor.memory_fit import Memory
from hpc.slurm.client import SlurmClient
from hpc.slurm.facts import ClusterFacts
from rltrain import arguments
from rltrain.arguments.errors import UserError

_PROBE_TIMEOUT = 300.0  # seconds


def doctor(argv: list[str], probe_nodes: bool = False) -> list[Check]:
    """Check what `python -m hpc.submit ARGV` would need. Never raises for what is wrong: it is one of the checks."""
    try:
        request = config.read_request(argv)
    except UserError as error:
        return [packages.check_python(), fail("flags", str(error)), *machine.check_machine(1, is_batch=False)]
    is_batch = request.options.partition is not None
    args, checks = check_flags(request)
    checks = [packages.check_python(), *packages.check_packages(need_training=not is_batch), *checks]
    checks += storage.check_storage(request.options.runs_dir, is_batch, _checkpoint_bytes(args))
    checks += machine.check_machine(_count_processes(args), is_batch)
    if is_batch:
        return checks + check_cluster(request.options, args, probe_nodes)
    return checks + _check_here(args)


def check_flags(request: Request) -> tuple[argparse.Namespace | None, list[Check]]:
    """The training flags (None if they are wrong, or none were given) and the checks of them and of their files."""
    try:
        flags = flag_data.merge(run_dir.stored_flags(request.options.layout), request.train)
        if not flags:
            return None, [ok("flags", "none were given: that is the built-in demo")]
        args = arguments.parse(flag_data.to_argv(flags))
    except UserError as error:
        return None, [fail("flags", str(error))]
    batch = (
        f"{args.rollout_batch_size} prompts × {args.n_samples_per_prompt} samples ="
        f" {args.num_steps_per_rollout} optimizer step(s) of {args.global_batch_size}"
    )
    try:
        arguments.check_inputs(args)
    except UserError as error:
        return None, [ok("flags", batch), fail("input files", str(error))]
    checks = [
        ok("flags", batch),
        ok("input files", f"model {args.hf_checkpoint}, prompts {args.prompt_data}"),
    ]
    return args, [*checks, *_check_saving(args)]


def _check_saving(args: argparse.Namespace) -> list[Check]:
    if args.save_interval is not None:
        return []
    text = "without --save-interval there is no checkpoint before the end or a stop"
    return [warn("checkpoints", text, "give --save-interval: a crash would cost everything")]


def check_cluster(options: SubmitOptions, args: argparse.Namespace | None, probe_nodes: bool) -> list[Check]:
    """Checks of Slurm, the partition, the memory of its GPUs and, if wanted, its nodes."""
    assert options.partition is not None
    facts, check = cluster.ask_cluster(SlurmClient())
    if facts is None:
        return [check]
    nodes, gpus = options.nodes or _count_nodes(args), args.actor_num_gpus_per_node if args else 0
    checks = [check, *cluster.check_partition(facts, options.partition, nodes, gpus, None)]
    if any(each.level == "fail" for each in checks):
        return checks
    if args is not None:
        checks += memory_fit.check_memory(args, _partition_memory(facts, options))
    if probe_nodes:
        checks += probe.probe_nodes(
            SlurmClient(timeout_s=_PROBE_TIMEOUT), options.runs_dir, options.partition, nodes
        )
    return checks


def _partition_memory(facts: ClusterFacts, options: SubmitOptions) -> Memory | None:
    assert options.partition is not None
    return cluster.partition_memory(facts, options.partition, None)


def _check_here(args: argparse.Namespace | None) -> list[Check]:
    gpus = machine.local_gpus()
    if args is None:
        return [ok("GPUs", f"{len(gpus)} on this machine")]
    ranks = args.actor_num_gpus_per_node
    engines = 0 if args.debug_train_only else args.rollout_num_gpus
    if not gpus:
        checks = [
            ok(
                "GPUs",
                f"none on this machine: {ranks} trainer rank(s) and {engines} engine rank(s) on its CPU",
            )
        ]
        return checks + memory_fit.check_memory(args, Memory(machine.machine_memory(), False, "this machine"))
    needed = max(ranks, engines) if args.colocate else ranks + engines
    text = f"{len(gpus)} on this machine, {needed} needed"
    if needed > len(gpus):
        return [fail("GPUs", text, "fewer --actor-num-gpus-per-node or --rollout-num-gpus, or --colocate")]
    return [
        ok("GPUs", text),
        *memory_fit.check_memory(args, Memory(min(gpus), True, "a GPU of this machine")),
    ]


def _count_processes(args: argparse.Namespace | None) -> int:
    if args is None:
        return 2
    return args.actor_num_gpus_per_node + (0 if args.debug_train_only else args.rollout_num_gpus)


def _count_nodes(args: argparse.Namespace | None) -> int:
    return 1 if args is None else args.actor_num_nodes


def _checkpoint_bytes(args: argparse.Namespace | None) -> float:
    return 0.0 if args is None else float(memory.checkpoint_bytes(memory_fit.read_shape(args), args.bf16))
