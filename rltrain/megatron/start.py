"""Where a run's weights come from: the checkpoint it goes on from, or what it starts from."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from rltrain.arguments.errors import UserError
from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.agreement import first_problem
from rltrain.megatron.checkpoint import TrainState, has_optimizer, load_checkpoint
from rltrain.megatron.checkpoint_dir import damaged_file, find_checkpoint, iteration_directory, problem
from rltrain.megatron.hf_weights import load_hf_weights
from rltrain.megatron.saved_weights import SavedWeights


@dataclass(frozen=True)
class WeightSource:
    """A Hugging Face directory, a checkpoint of ours, or (both None) the model's own initialisation."""

    hf_directory: Path | None = None
    checkpoint: Path | None = None


def initial_source(args: argparse.Namespace) -> WeightSource:
    """Where the run's first weights are from: --load, else random ones if asked for, else --hf-checkpoint.

    Raises:
        UserError: --load is neither a model directory nor one with checkpoints.
    """
    default = WeightSource() if args.random_init else WeightSource(hf_directory=Path(args.hf_checkpoint))
    if args.load is None:
        return default
    # slime's scripts give one directory to --load and --save: empty when the run starts for the first time.
    is_own = args.save is not None and Path(args.load) == Path(args.save)
    return default if is_own else weight_source(Path(args.load), "--load", args.ckpt_step)


def reference_source(args: argparse.Namespace) -> WeightSource:
    """The reference policy: --ref-load, else what the run started from."""
    if args.ref_load is None:
        return initial_source(args)
    return weight_source(Path(args.ref_load), "--ref-load", args.ref_ckpt_step)


def teacher_source(args: argparse.Namespace) -> WeightSource:
    """The teacher of on-policy distillation: --opd-teacher-load."""
    return weight_source(Path(args.opd_teacher_load), "--opd-teacher-load", args.opd_teacher_ckpt_step)


def weight_source(directory: Path, flag: str, step: int | None) -> WeightSource:
    """Weights in a directory that a flag names; all ranks look together.

    Raises:
        UserError: it is neither a Hugging Face directory nor one with a complete checkpoint.
    """
    if (directory / "config.json").exists():
        return WeightSource(hf_directory=directory)
    checkpoint = usable_checkpoint(directory, step)
    if checkpoint is None:
        raise UserError(
            f"{flag} {directory} holds neither a Hugging Face model (config.json and safetensors) nor a complete"
            " checkpoint (iter_0000040/ with its manifest.json)."
        )
    return WeightSource(checkpoint=checkpoint)


def usable_checkpoint(directory: Path, iteration: int | None = None) -> Path | None:
    """The newest checkpoint whose files are what was written, or the one of `iteration`; None if there is none.

    Every rank reads a share of the files.

    Raises:
        UserError: the checkpoint of the wanted `iteration` is missing, incomplete or damaged.
    """
    damaged: dict[Path, str] = {}
    while True:
        checkpoint = find_checkpoint(directory, iteration, damaged)
        if checkpoint is None:
            return None
        file = first_problem(damaged_file(checkpoint, dist.get_rank(), dist.get_world_size()))
        if file is None:
            return checkpoint
        damaged[checkpoint] = f"{file} is damaged: its checksum is another"


def load_source(models: list[GPTModel], shape: ModelShape, source: WeightSource) -> None:
    """Fill a model (its chunks on this rank) that is not yet wrapped for data parallelism."""
    if source.hf_directory is not None:
        load_hf_weights(models, shape, source.hf_directory)
    elif source.checkpoint is not None:
        load_checkpoint(source.checkpoint, TrainState(models))


def first_weights(args: argparse.Namespace, shape: ModelShape, models: list[GPTModel]) -> Callable[[], None]:
    """What gives a model the weights that the run starts with, whatever is loaded into it before.

    Called when the model is new: the random weights that it has then are nowhere else.
    """
    source = initial_source(args)
    if source == WeightSource():
        return partial(SavedWeights(models).give, models)
    return partial(load_source, models, shape, source)


def own_checkpoint(args: argparse.Namespace) -> Path | None:
    """The newest usable checkpoint of this run, or None."""
    return usable_checkpoint(Path(args.save)) if args.save else None


def continued_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint of --load that a run which has none of its own goes on from; None with --finetune."""
    if args.load is None or args.finetune:
        return None
    return initial_source(args).checkpoint


def resume(args: argparse.Namespace, state: TrainState, checkpoint: Path | None) -> int:
    """Go on from a checkpoint.

    With --no-load-optim, or when the checkpoint was saved with --no-save-optim, the optimizer starts afresh.

    Returns:
        The number of rollouts that have been trained on, 0 without a checkpoint.
    """
    if checkpoint is None:
        return 0
    if args.no_load_optim or not has_optimizer(checkpoint):
        iteration = load_checkpoint(checkpoint, TrainState(state.models))
        if state.optimizer is not None:
            state.optimizer.reload_model_params()
        return iteration
    return load_checkpoint(checkpoint, state, load_rng=not args.no_load_rng)


def matching(directory: Path, iteration: int) -> Path:
    """The checkpoint, of a critic or of a reference, that belongs to one of the policy.

    Raises:
        UserError: it is missing or incomplete.
    """
    checkpoint = iteration_directory(directory, iteration)
    if (why := problem(checkpoint)) is not None:
        raise UserError(
            f"{checkpoint} is missing or incomplete ({why}), and the policy's checkpoint of that step needs it. Bring"
            " it back, or remove the policy's too, so that the run goes on from an earlier one."
        )
    return checkpoint
