"""bf16 with sharded optimizer state, or fp32: where no flag says it, the trainer's GPUs do, once for the whole run.

As in slime: on GPUs the trainer works in bf16, with the distributed optimizer; on a CPU it works in fp32. The choice is
stored in the run's `config.toml`, so that all roles have the same. Where a run has a checkpoint it goes on as it was.
"""

from __future__ import annotations

from hpc.gpus import torch_is_for_cpus
from hpc.planning.sbatch_flags import Component
from hpc.planning.slurm_tables import SlurmTables
from hpc.submitting.resuming import has_checkpoint
from rltrain.arguments.config import Config
from rltrain.run.layout import RunLayout
from rltrain.run.toml_values import read_table

_NO_GPU = ("", "-1")  # in CUDA_VISIBLE_DEVICES


def decide(config: Config, layout: RunLayout, *, gpus: bool, idle: bool = False) -> tuple[Config, str]:
    """Fill in `bf16` and `use_distributed_optimizer` where they are None.

    Args:
        config: resolved.
        layout: of the run, which may exist already.
        gpus: whether the trainer has GPUs, which its torch can use.
        idle: whether it has GPUs that its torch can't use.

    Returns:
        The configuration, and what was chosen and why in one line; empty if there was nothing to choose.
    """
    given = {
        "bf16": config.model.bf16,
        "use_distributed_optimizer": config.parallel.use_distributed_optimizer,
    }
    open_names = [name for name, value in given.items() if value is None]
    if not open_names:
        return config, ""
    began = _begun_with(layout)
    none = "the trainer can't use the job's GPUs (torch for CPUs, or CUDA_VISIBLE_DEVICES)" if idle else ""
    why = (
        "the run began this way"
        if began
        else "the trainer has GPUs"
        if gpus
        else none or "the trainer has no GPU"
    )
    taken = {name: bool(began.get(name)) if began else gpus for name in open_names}
    options = [f"--{'' if on else 'no-'}{name.replace('_', '-')}" for name, on in taken.items()]
    return config.replace(**taken), f"chosen because {why}: {' '.join(options)}"


def _begun_with(layout: RunLayout) -> dict[str, object]:
    """The stored configuration of a run that goes on from a checkpoint of its own."""
    if not layout.config.is_file() or not has_checkpoint(layout):
        return {}
    return read_table(layout, "train")


def has_gpus(trainer: Component, tables: SlurmTables) -> bool:
    """Whether the trainer of a Slurm job has GPUs that its torch can use."""
    if tables.env.get("CUDA_VISIBLE_DEVICES") in _NO_GPU:
        return False
    # Another Python, of a container say, may have another torch than this one.
    return trainer.gpus > 0 and not (tables.python is None and torch_is_for_cpus())
