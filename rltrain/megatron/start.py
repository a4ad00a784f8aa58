"""Where a run's weights come from: the checkpoint it goes on from, or what it starts from."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from rltrain.arguments.errors import UserError
from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.checkpoint import (
    TrainState,
    find_checkpoint,
    has_optimizer,
    is_complete,
    load_checkpoint,
)
from rltrain.megatron.hf_weights import load_hf_weights


@dataclass(frozen=True)
class WeightSource:
    """A Hugging Face directory, a checkpoint of ours, or (both None) the model's own initialisation."""

    hf_directory: Path | None = None
    checkpoint: Path | None = None


def initial_source(args: argparse.Namespace) -> WeightSource:
    """What the run's first step starts from: --load, else random weights if asked for, else --hf-checkpoint.

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
    """Weights in a directory that a flag names.

    Raises:
        UserError: it is neither a Hugging Face directory nor one with a complete checkpoint.
    """
    if (directory / "config.json").exists():
        return WeightSource(hf_directory=directory)
    checkpoint = find_checkpoint(directory, step)
    if checkpoint is None:
        raise UserError(
            f"{flag} {directory} holds neither a Hugging Face model (config.json and safetensors) nor a complete"
            " checkpoint (iter_0000040/ with its manifest.json)."
        )
    return WeightSource(checkpoint=checkpoint)


def load_source(models: list[GPTModel], shape: ModelShape, source: WeightSource) -> None:
    """Fill a model (its chunks on this rank) that is not yet wrapped for data parallelism."""
    if source.hf_directory is not None:
        load_hf_weights(models, shape, source.hf_directory)
    elif source.checkpoint is not None:
        load_checkpoint(source.checkpoint, TrainState(models))


def resume(args: argparse.Namespace, state: TrainState, iteration: int | None = None) -> int:
    """Go on from the newest complete checkpoint of this run, if there is one.

    With --no-load-optim, or when the checkpoint was saved with --no-save-optim, the optimizer starts afresh.

    Args:
        iteration: Take this checkpoint, not the newest: a critic's has to be as old as the policy's. 0: none.

    Returns:
        The number of rollouts that have been trained on, 0 for a fresh run.

    Raises:
        UserError: there is no complete checkpoint of `iteration`.
    """
    if not args.save or iteration == 0:
        return 0
    directory = Path(args.save)
    checkpoint = find_checkpoint(directory) if iteration is None else matching(directory, iteration)
    if checkpoint is None:
        return 0
    if args.no_load_optim or not has_optimizer(checkpoint):
        iteration = load_checkpoint(checkpoint, TrainState(state.models))
        if state.optimizer is not None:
            state.optimizer.reload_model_params()
        return iteration
    return load_checkpoint(checkpoint, state)


def matching(directory: Path, iteration: int) -> Path:
    """The checkpoint, of a critic or of a reference, that belongs to one of the policy.

    Raises:
        UserError: it is missing or incomplete.
    """
    checkpoint = directory / f"iter_{iteration:07d}"
    if not is_complete(checkpoint):
        raise UserError(
            f"{checkpoint} is missing or incomplete, and the policy's checkpoint of that step needs it. Bring it"
            " back, or remove the policy's too, so that the run goes on from an earlier one."
        )
    return checkpoint


def newest_iteration(args: argparse.Namespace) -> int:
    """The number of rollouts that this run's newest complete checkpoint was trained on, 0 if there is none."""
    checkpoint = find_checkpoint(Path(args.save)) if args.save else None
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("iter_"))
