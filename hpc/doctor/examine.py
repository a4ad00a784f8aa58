"""All checks of the doctor, in the order in which things would go wrong."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hpc import config, run_dir
from hpc.config import Request, SubmitOptions
from hpc.doctor import cluster, machine, memory, memory_fit, packages, probe, storage, tracking
from hpc.doctor.check import Check, fail, ok, warn
from hpc.doctor.memory_fit import Memory
from hpc.shared_dir import is_one_machine
from hpc.slurm.client import SlurmClient, SlurmError
from hpc.slurm.facts import ClusterFacts
from rltrain import arguments
from rltrain.arguments import flags as flag_data
from rltrain.arguments.critic_flags import use_critic
from rltrain.arguments.errors import UserError
from rltrain.arguments.flags import Flags

_PROBE_TIMEOUT = 300.0  # seconds


def doctor(argv: list[str], probe_nodes: bool = False) -> list[Check]:
    """Check what `python -m hpc.submit ARGV` would need. Never raises for what is wrong: it is one of the checks."""
    try:
        request = config.read_request(argv)
    except UserError as error:
        return [packages.check_python(), fail("flags", str(error)), *machine.check_machine(1, is_batch=False)]
    is_batch = request.options.partition is not None
    checks = [packages.check_python(), *packages.check_packages(need_training=not is_batch)]
    facts = None
    if is_batch:
        facts, check = cluster.ask_cluster(SlurmClient())
        checks.append(check)
    args, found = check_flags(request, facts)
    checks += found
    others = is_batch and not (facts and is_one_machine(facts))
    checks += storage.check_storage(request.options.runs_dir, others, _checkpoint_bytes(args))
    checks += machine.check_machine(_count_processes(args), is_batch)
    if facts is not None:
        return checks + check_cluster(request.options, args, facts, probe_nodes)
    if is_batch:
        return checks
    if probe_nodes:
        checks.append(warn("nodes", "--probe-nodes looks at no node without --partition", "give --partition"))
    return checks + _check_here(args)


def check_flags(
    request: Request, facts: ClusterFacts | None = None
) -> tuple[argparse.Namespace | None, list[Check]]:
    """The training flags (None if they are wrong, or none were given) and the checks of them and of their files."""
    try:
        flags = flag_data.merge(run_dir.stored_flags(request.options.layout), request.train)
        if not flags:
            return None, [ok("flags", "none were given: that is the built-in demo")]
        if facts is not None:
            return _check_plan(request.options, flags)
        args = arguments.parse(flag_data.to_argv(flags))
    except UserError as error:
        return None, [fail("flags", str(error))]
    try:
        arguments.check_inputs(args)
    except UserError as error:
        return None, [_describe_batch(args), fail("input files", str(error))]
    return args, [_describe_batch(args), *_describe_inputs(args)]


def _check_plan(options: SubmitOptions, flags: Flags) -> tuple[argparse.Namespace, list[Check]]:
    """The flags as the job would have them, with its nodes shared out; and what sbatch says to its script."""
    from hpc.executor import check_script
    from hpc.slurm_job import plan_job

    job = plan_job(options, flags)
    checks = [_describe_batch(job.args), *_describe_inputs(job.args), ok("plan", job.split.explain())]
    try:
        return job.args, [*checks, ok("sbatch --test-only", check_script(job.text()))]
    except SlurmError as error:
        return job.args, [*checks, fail("sbatch --test-only", str(error))]


def _describe_batch(args: argparse.Namespace) -> Check:
    return ok(
        "flags",
        f"{args.rollout_batch_size} prompts × {args.n_samples_per_prompt} samples ="
        f" {args.num_steps_per_rollout} optimizer step(s) of {args.global_batch_size}",
    )


def _describe_inputs(args: argparse.Namespace) -> list[Check]:
    prompts = args.prompt_data or ", ".join(args.prompt_data_mix[::2])
    found = ok("input files", f"model {args.hf_checkpoint}, prompts {prompts}")
    wandb = tracking.check_tracking(args, os.environ, Path.home() / ".netrc")
    return [found, *_check_saving(args), wandb]


def _check_saving(args: argparse.Namespace) -> list[Check]:
    if args.save_interval is not None:
        return []
    text = "without --save-interval there is no checkpoint before the end or a stop"
    return [warn("checkpoints", text, "give --save-interval: a crash would cost everything")]


def check_cluster(
    options: SubmitOptions, args: argparse.Namespace | None, facts: ClusterFacts, probe_nodes: bool
) -> list[Check]:
    """Checks of the partition, the memory of its GPUs and, if wanted, its nodes."""
    assert options.partition is not None
    nodes, gpus = options.nodes or _count_nodes(args), args.actor_num_gpus_per_node if args else 0
    checks = cluster.check_partition(facts, options.partition, nodes, gpus, options.gpu_type)
    if any(check.level == "fail" for check in checks):
        return checks
    if args is not None:
        memory_of_one = cluster.partition_memory(facts, options.partition, options.gpu_type)
        checks += memory_fit.check_memory(args, memory_of_one)
    if probe_nodes:
        client = SlurmClient(timeout_s=_PROBE_TIMEOUT)
        checks += probe.probe_nodes(
            client, options.runs_dir, options.partition, nodes, _probe_options(options)
        )
    return checks


def _probe_options(options: SubmitOptions) -> list[str]:
    wanted = {"account": options.account, "qos": options.qos}
    return [f"--{name}={value}" for name, value in wanted.items() if value]


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
    if args is None:
        return 0.0
    shape = memory_fit.read_shape(args)
    return float(memory.checkpoint_bytes(shape, args.bf16, critic=use_critic(args)))
