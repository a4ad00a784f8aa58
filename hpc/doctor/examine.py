"""All checks of the doctor, in the order in which things would go wrong."""

from __future__ import annotations

import os
from pathlib import Path

from hpc.doctor import machine, memory, memory_fit, partition, probe, requirements, storage
from hpc.doctor.check import Check, fail, ok, warn
from hpc.doctor.memory_fit import Memory
from hpc.gpus import Gpu, local_gpus, usable_gpus
from hpc.planning.job_plan import make_plan
from hpc.planning.request import Request, SubmitOptions
from hpc.slurm.client import SlurmClient, SlurmError
from hpc.slurm.cluster import ClusterFacts
from hpc.submitting import precision, run_dir
from hpc.submitting.command_line import read_request, refuse_without_partition
from hpc.submitting.run_dir import is_one_machine
from rltrain import arguments, inputs
from rltrain.arguments import flags as flag_data
from rltrain.arguments.config import Config
from rltrain.arguments.flags import Flags
from rltrain.arguments.groups.checkpoint import Checkpoint
from rltrain.arguments.groups.critic import use_critic
from rltrain.arguments.groups.rollout import Rollout
from rltrain.arguments.groups.training import Training
from rltrain.arguments.hf_config import check_same_shape
from rltrain.models.as_transformers import standard_config
from rltrain.run.errors import UserError
from rltrain.run.files import read_object

_PROBE_TIMEOUT = 300.0  # seconds


def doctor(argv: list[str], probe_nodes: bool = False) -> list[Check]:
    """Check everything that `python -m hpc.submit ARGV` needs. A problem never raises: it is one of the checks."""
    try:
        request = read_request(argv)
        refuse_without_partition(argv, request.options)
    except UserError as error:
        return [
            requirements.check_python(),
            fail("flags", str(error)),
            *machine.check_machine(1, is_batch=False),
        ]
    is_batch = request.options.partition is not None
    checks = [requirements.check_python(), *requirements.check_packages(need_training=not is_batch)]
    facts = None
    if is_batch:
        facts, check = partition.ask_cluster(SlurmClient())
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
        checks.append(warn("nodes", "--probe-nodes checks nodes only with --partition", "give --partition"))
    return checks + _check_here(args)


def check_flags(request: Request, facts: ClusterFacts | None = None) -> tuple[Config | None, list[Check]]:
    """The training flags (None if they are wrong, or none were given) and the checks of them and of their files."""
    try:
        flags = flag_data.merge(run_dir.stored_flags(request.options.layout), request.train)
        if not flags:
            return None, [ok("flags", "none given: the built-in demo")]
        if facts is not None:
            return _check_plan(request.options, flags)
        config = arguments.parse(flag_data.to_argv(flags))
        # A Slurm that could not be asked is taken to have GPUs.
        gpus = request.options.partition is not None or bool(usable_gpus())
        config, chosen = precision.decide(config, request.options.layout, gpus=gpus)
    except UserError as error:
        return None, [fail("flags", str(error))]
    try:
        config = inputs.check_inputs(config)
    except UserError as error:
        return None, [_describe_batch(config.rollout, config.training), fail("input files", str(error))]
    found = [*_describe_precision(chosen), *_describe_inputs(config), *_check_imports(config, here=True)]
    return config, [_describe_batch(config.rollout, config.training), *found]


def _check_plan(options: SubmitOptions, flags: Flags) -> tuple[Config, list[Check]]:
    """The flags as the job would have them, with its nodes shared out; and what sbatch says to its script."""
    from hpc.submitting.executor import check_script
    from hpc.submitting.slurm_job import plan_job

    job = plan_job(options, flags)
    config = job.config
    checks = [_describe_batch(config.rollout, config.training), *_describe_precision(job.chosen)]
    checks += [
        *_describe_inputs(config),
        *_check_imports(config, here=False),
        ok("plan", job.split.explain()),
    ]
    try:
        return config, [*checks, ok("sbatch --test-only", check_script(job.text()))]
    except SlurmError as error:
        return config, [*checks, fail("sbatch --test-only", str(error))]


def _describe_batch(rollout: Rollout, training: Training) -> Check:
    return ok(
        "flags",
        f"{rollout.rollout_batch_size} prompts × {rollout.n_samples_per_prompt} samples ="
        f" {training.num_steps_per_rollout} optimizer step(s) of {training.global_batch_size}",
    )


def _describe_precision(chosen: str) -> list[Check]:
    return [ok("precision", chosen)] if chosen else []


def _describe_inputs(config: Config) -> list[Check]:
    prompts = config.data.prompt_data or ", ".join((config.data.prompt_data_mix or [])[::2])
    found = ok("input files", f"model {config.model.hf_checkpoint}, prompts {prompts}")
    wandb = storage.check_tracking(config.tracking, os.environ, Path.home() / ".netrc")
    return [found, *_check_model(config.model.hf_checkpoint), *_check_saving(config.checkpoint), wandb]


def _check_imports(config: Config, here: bool) -> list[Check]:
    """What functions of the flags import and this Python has not; the job's own machines may have it."""
    absent = inputs.absent_imports(config)
    if here:
        return [fail("imports", line, "install it, or import it where it is used") for line in absent]
    return [warn("imports", line, "the job's machines need it") for line in absent]


def _check_model(hf_checkpoint: str) -> list[Check]:
    """Whether transformers, where it is installed, makes of the model's config.json what the trainer does."""
    path = Path(hf_checkpoint) / "config.json"
    if not path.is_file():  # an earlier job will write it
        return []
    try:
        config = read_object(path)
        standard = standard_config(path.parent, config)
        if standard is None:
            return []
        check_same_shape(config, standard, hf_checkpoint)
    except UserError as error:
        return [fail("model", str(error))]
    return [ok("model", "transformers reads the same model from its config.json")]


def _check_saving(checkpoint: Checkpoint) -> list[Check]:
    if checkpoint.save_interval is not None:
        return []
    text = "without --save-interval a checkpoint is written only at the end or at a stop"
    return [warn("checkpoints", text, "give --save-interval: a crash would lose all training")]


def check_cluster(
    options: SubmitOptions, config: Config | None, facts: ClusterFacts, probe_nodes: bool
) -> list[Check]:
    """Checks of the partition, the memory of its GPUs and, if wanted, its nodes."""
    assert options.partition is not None
    nodes = options.nodes or (config.parallel.actor_num_nodes if config else 1)
    gpus = config.parallel.actor_num_gpus_per_node if config else 0
    checks = partition.check_partition(facts, options.partition, nodes, gpus, options.gpu_type)
    if any(check.level == "fail" for check in checks):
        return checks
    if config is not None:
        memory_of_one = partition.partition_memory(facts, options.partition, options.gpu_type)
        checks += memory_fit.check_memory(config, memory_of_one)
    if probe_nodes:
        client = SlurmClient(timeout_s=_PROBE_TIMEOUT)
        checks += probe.probe_nodes(
            client, options.runs_dir, options.partition, nodes, _probe_options(options)
        )
    return checks


def _probe_options(options: SubmitOptions) -> list[str]:
    wanted = {"account": options.account, "qos": options.qos}
    return [f"--{name}={value}" for name, value in wanted.items() if value]


def _check_here(config: Config | None) -> list[Check]:
    return [*requirements.check_gpu_software(len(local_gpus())), *_check_room(config, usable_gpus())]


def _check_room(config: Config | None, gpus: list[Gpu]) -> list[Check]:
    if config is None:
        return [ok("GPUs", f"{len(gpus)} on this machine")]
    ranks = config.parallel.actor_num_gpus_per_node
    engines = 0 if config.debug.debug_train_only else config.engines.rollout_num_gpus
    if not gpus:
        checks = [
            ok(
                "GPUs",
                f"none on this machine: {ranks} trainer rank(s) and {engines} engine rank(s) on its CPU",
            )
        ]
        return checks + memory_fit.check_memory(
            config, Memory(machine.machine_memory(), False, "this machine")
        )
    try:
        plan = make_plan(config, gpus=[gpu.name for gpu in gpus])
    except UserError as error:
        text, _, advice = str(error).partition(". ")
        return [fail("GPUs", text, advice)]
    seen = {each.name: each.env["CUDA_VISIBLE_DEVICES"] for each in plan.processes}
    shares = [f"{name} sees {names}" for name, names in seen.items() if names]
    smallest = Memory(min(gpu.memory for gpu in gpus), True, "a GPU of this machine")
    return [
        ok("GPUs", f"{len(gpus)} on this machine: {', '.join(shares)}"),
        *memory_fit.check_memory(config, smallest),
    ]


def _count_processes(config: Config | None) -> int:
    if config is None:
        return 2
    return config.parallel.actor_num_gpus_per_node + (
        0 if config.debug.debug_train_only else config.engines.rollout_num_gpus
    )


def _checkpoint_bytes(config: Config | None) -> float:
    if config is None:
        return 0.0
    shape = memory_fit.read_shape(config.model)
    return float(
        memory.checkpoint_bytes(
            shape,
            bool(config.model.bf16),
            critic=use_critic(config.algorithm),
            lora_rank=config.lora.lora_rank,
        )
    )
