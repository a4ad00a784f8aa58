"""Where a run's weights come from: the checkpoint it goes on from, or what it starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from rltrain.arguments.config import Config
from rltrain.arguments.groups.algorithm import Algorithm
from rltrain.arguments.groups.checkpoint import Checkpoint
from rltrain.arguments.groups.model import Model
from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.checkpoint.directory import (
    checkpoints,
    damaged_file,
    find_checkpoint,
    is_checkpoint,
    iteration_directory,
    problem,
)
from rltrain.megatron.checkpoint.load import has_optimizer, load_checkpoint
from rltrain.megatron.checkpoint.state import TrainState
from rltrain.megatron.model.host_copy import SavedWeights
from rltrain.megatron.model.layers.lora import reset_adapters
from rltrain.megatron.model.layers.mtp import without_head
from rltrain.megatron.model.load import load_hf_weights
from rltrain.megatron.ranks import first_problem
from rltrain.run.errors import UserError
from rltrain.run.files import others_may_write


@dataclass(frozen=True)
class WeightSource:
    """A Hugging Face directory, a checkpoint of ours, or (both None) the model's own initialisation.

    `flag`: which flag named it.
    """

    hf_directory: Path | None = None
    checkpoint: Path | None = None
    flag: str = "--random-init"

    def __str__(self) -> str:
        place = self.hf_directory or self.checkpoint
        return f"{self.flag} {place}" if place else self.flag


def initial_source(checkpoint: Checkpoint, model: Model) -> WeightSource:
    """Where the run's first weights are from: --load, random ones if asked for, --ref-load, or --hf-checkpoint.

    As in slime, --ref-load counts where --load is not given, is where the run itself saves, or is missing or empty.

    Raises:
        UserError: the directory is neither a model directory nor one with checkpoints.
    """
    load, reference = _foreign_load(checkpoint), checkpoint.ref_load
    if load is not None and (reference is None or (load.is_dir() and any(load.iterdir()))):
        return weight_source(load, "--load", checkpoint.ckpt_step)
    if model.random_init:
        return WeightSource()
    if reference is not None:
        return weight_source(Path(reference), "--ref-load", checkpoint.ref_ckpt_step)
    return WeightSource(hf_directory=Path(model.hf_checkpoint), flag="--hf-checkpoint")


def _foreign_load(checkpoint: Checkpoint) -> Path | None:
    """--load, if it is not where the run saves: slime's scripts give one directory to both."""
    load, save = checkpoint.load, checkpoint.save
    return None if load is None or (save is not None and Path(load) == Path(save)) else Path(load)


def reference_source(checkpoint: Checkpoint, model: Model) -> WeightSource:
    """The reference policy: --ref-load, else what the run started from."""
    if checkpoint.ref_load is None:
        return initial_source(checkpoint, model)
    return weight_source(Path(checkpoint.ref_load), "--ref-load", checkpoint.ref_ckpt_step)


def teacher_source(algorithm: Algorithm) -> WeightSource:
    """The teacher of on-policy distillation: --opd-teacher-load."""
    assert algorithm.opd_teacher_load is not None
    return weight_source(
        Path(algorithm.opd_teacher_load), "--opd-teacher-load", algorithm.opd_teacher_ckpt_step
    )


def weight_source(directory: Path, flag: str, step: int | None) -> WeightSource:
    """Weights in a directory that a flag names; all ranks look together.

    Raises:
        UserError: it is neither a Hugging Face directory nor one with a complete checkpoint.
    """
    if (directory / "config.json").exists():
        return WeightSource(hf_directory=directory, flag=flag)
    checkpoint = usable_checkpoint(directory, step)
    if checkpoint is None:
        raise UserError(
            f"{flag} {directory} holds neither a Hugging Face model (config.json and safetensors) nor a complete"
            " checkpoint (iter_0000040/ with its manifest.json)."
        )
    return WeightSource(checkpoint=checkpoint, flag=flag)


def usable_checkpoint(directory: Path, iteration: int | None = None) -> Path | None:
    """The newest checkpoint whose checksums match, or the one of `iteration`; None without one.

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
        damaged[checkpoint] = f"{file} is damaged: its checksum differs"


def check_trusted(config: Config) -> None:
    """Check that nobody else can have written the checkpoints that this run reads; all ranks together.

    Both formats hold pickled Python objects, and unpickling runs code that is in a file.

    Raises:
        UserError: names the first file, and what to do.
    """
    check_directories(_directories(config), trust=config.checkpoint.trust_load)


def check_directories(directories: Iterable[Path], *, trust: bool) -> None:
    """The same for these directories, whose checkpoints will be read whatever else is there; `trust` passes them.

    Raises:
        UserError: see `check_trusted`.
    """
    if trust:
        return
    found = None
    if dist.get_rank() == 0:
        found = next(filter(None, map(_foreign_file, directories)), None)
    if (why := first_problem(found)) is not None:
        raise UserError(
            f"{why}, and loading a checkpoint runs the code in it. If you trust it, give --trust-load;"
            " if it is yours, `chmod -R go-w` its directory."
        )


def _directories(config: Config) -> list[Path]:
    """Where this run may read checkpoints."""
    checkpoint, critic = config.checkpoint, config.critic
    own = [Path(checkpoint.save) / name for name in ("", "critic", "reference")] if checkpoint.save else []
    flags = [checkpoint.load, checkpoint.ref_load, config.algorithm.opd_teacher_load]
    named = [Path(each) for each in (*flags, critic.critic_load, critic.critic_save) if each]
    return own + [each for each in named if not (each / "config.json").exists()]  # safetensors hold no code


def _foreign_file(directory: Path) -> str | None:
    """A file of a checkpoint in it that others may have written."""
    places = [directory] if is_checkpoint(directory) else list(checkpoints(directory).values())
    files = (path for place in places for path in sorted(place.rglob("*")) if path.is_file())
    return next(filter(None, map(others_may_write, files)), None)


def load_source(
    models: list[GPTModel], shape: ModelShape, source: WeightSource, *, is_trained: bool = True
) -> None:
    """Fill a model (its chunks on this rank) that is not yet wrapped for data parallelism.

    Untrained weights, such as a reference's, may have an MTP layer or not.
    """
    reset_adapters(models)  # what the source does not have
    with nullcontext() if is_trained else without_head(models):
        if source.hf_directory is not None:
            load_hf_weights(models, shape, source.hf_directory)
        elif source.checkpoint is not None:
            load_checkpoint(source.checkpoint, TrainState(models), is_trained=is_trained)


def first_weights(
    checkpoint: Checkpoint, model: Model, shape: ModelShape, models: list[GPTModel]
) -> Callable[[], None]:
    """What gives a model the weights that the run starts with, whatever is loaded into it before.

    Called when the model is new: the random weights that it has then are nowhere else.
    """
    source = initial_source(checkpoint, model)
    if source == WeightSource():
        return partial(SavedWeights(models).give, models)
    return partial(load_source, models, shape, source)


def own_checkpoint(checkpoint: Checkpoint) -> Path | None:
    """The newest usable checkpoint of this run, or None."""
    return usable_checkpoint(Path(checkpoint.save)) if checkpoint.save else None


def continued_checkpoint(checkpoint: Checkpoint, source: WeightSource) -> Path | None:
    """The checkpoint that a run goes on from, with optimizer and rollout number; None where only its weights count."""
    goes_on = source.flag == "--save" or (source.flag == "--load" and not checkpoint.finetune)
    return source.checkpoint if goes_on else None


def resume(checkpoint_config: Checkpoint, state: TrainState, checkpoint: Path | None) -> int:
    """Go on from a checkpoint.

    With --no-load-optim, or when the checkpoint was saved with --no-save-optim, the optimizer starts afresh.

    Returns:
        The number of rollouts that have been trained on, 0 without a checkpoint.
    """
    if checkpoint is None:
        return 0
    if checkpoint_config.no_load_optim or not has_optimizer(checkpoint):
        iteration = load_checkpoint(checkpoint, TrainState(state.models))
        if state.optimizer is not None:
            state.optimizer.reload_model_params()
        return iteration
    return load_checkpoint(checkpoint, state, load_rng=not checkpoint_config.no_load_rng)


def matching(directory: Path, iteration: int) -> Path:
    """The checkpoint, of a critic or of a reference, that belongs to one of the policy.

    Raises:
        UserError: it is missing or incomplete.
    """
    checkpoint = iteration_directory(directory, iteration)
    if (why := problem(checkpoint)) is not None:
        raise UserError(
            f"{checkpoint} is missing or incomplete ({why}), and the policy's checkpoint of that step needs it."
            " Restore it, or remove the policy's too, so that the run resumes from an earlier one."
        )
    return checkpoint
