"""Megatron's older checkpoint format, `--ckpt-format torch`: every model parallel rank's state as it is in memory.

It can only be read by a run with the same layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from rltrain.megatron.checkpoint.extra_state import MARK, load_weights
from rltrain.megatron.checkpoint.state import (
    TrainState,
    chunks,
    layout,
    optimizer_kind,
    restore_rng,
    rng_state,
)
from rltrain.megatron.device import megatron_scope
from rltrain.megatron.model.layers.lora import is_adapter
from rltrain.megatron.model.optimizer import load_optimizer
from rltrain.megatron.ranks import first_problem
from rltrain.run.errors import UserError

_FILE, _OPTIMIZER_FILE = "model_optim_rng.pt", "distrib_optim.pt"


def is_legacy(checkpoint: Path) -> bool:
    """Whether it is in Megatron's `torch` format: one directory a model parallel rank."""
    return any(checkpoint.glob("mp_rank_*"))


def rank_directory(checkpoint: Path) -> Path:
    """Where this model parallel rank's state lies, with Megatron's names: `mp_rank_01`, `mp_rank_01_002`."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    expert = parallel_state.get_expert_model_parallel_world_size() > 1
    if parallel_state.get_pipeline_model_parallel_world_size() > 1 or expert:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if expert:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return checkpoint / name


def write_legacy(checkpoint: Path, iteration: int, state: TrainState, *, save_rng: bool) -> None:
    """Write this rank's files. Data parallel ranks talk to each other if the optimizer is shared out over them.

    Raises:
        OSError: they can't be written.
    """
    directory = rank_directory(checkpoint)
    directory.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"iteration": iteration, "layout": _layout()}
    content |= {key: model.state_dict() for key, model in chunks(state)}
    if save_rng:
        content["rng_state"] = rng_state()
    try:
        if state.optimizer is not None:
            with megatron_scope():
                content["optimizer"] = state.optimizer.state_dict()
                if optimizer_kind(state.optimizer) == "distributed":
                    state.optimizer.save_parameter_state(str(directory / _OPTIMIZER_FILE))
        if state.scheduler is not None:
            content["opt_param_scheduler"] = state.scheduler.state_dict()
        if parallel_state.get_expert_data_parallel_rank() == 0:
            torch.save(content, directory / _FILE)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(str(error)) from error


def load_legacy(checkpoint: Path, state: TrainState, *, load_rng: bool) -> int:
    """See `rltrain.megatron.checkpoint.load.load_checkpoint`.

    Raises:
        UserError: it was saved with another layout, or by another model.
    """
    _check_layout(checkpoint, state)
    content = _read(rank_directory(checkpoint))
    differences = [_difference(content.get(key, {}), model.state_dict()) for key, model in chunks(state)]
    problem = first_problem(next((each for each in differences if each is not None), None))
    if problem is not None:
        raise UserError(f"{checkpoint} holds a different model from --hf-checkpoint: {problem}.")
    for key, model in chunks(state):
        load_weights(model, content[key])
    if state.optimizer is not None:
        with megatron_scope():
            load_optimizer(state.optimizer, content["optimizer"])
            if optimizer_kind(state.optimizer) == "distributed":
                state.optimizer.load_parameter_state(str(rank_directory(checkpoint) / _OPTIMIZER_FILE))
        if load_rng and "rng_state" in content:
            restore_rng(content["rng_state"])
    if state.scheduler is not None:
        state.scheduler.load_state_dict(content["opt_param_scheduler"])
    return int(content["iteration"])


def legacy_has_optimizer(checkpoint: Path) -> bool:
    """Whether the optimizer was saved too."""
    return "optimizer" in _read(sorted(checkpoint.glob("mp_rank_*"))[0])


def _check_layout(checkpoint: Path, state: TrainState) -> None:
    stored = _read(sorted(checkpoint.glob("mp_rank_*"))[0]).get("layout", {})
    wanted = _layout()
    if state.optimizer is None:
        wanted.pop("data_parallel_size")
    differing = {name: value for name, value in wanted.items() if stored.get(name, value) != value}
    missing = None if rank_directory(checkpoint).is_dir() else rank_directory(checkpoint).name
    if differing or first_problem(missing):
        said = ", ".join(
            f"{name.replace('_', '-')} {stored[name]} (now {value})" for name, value in differing.items()
        )
        raise UserError(
            f"{checkpoint} is in the format `torch`, which fits only the layout that it was saved with:"
            f" {said or f'{missing} is missing'}. Start with the same sizes, and save with"
            " --ckpt-format torch_dist, which fits any."
        )


def _layout() -> dict[str, int]:
    return {
        **layout(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
    }


def _difference(stored: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    for name, tensor in wanted.items():
        if not isinstance(tensor, torch.Tensor) or MARK in name or is_adapter(name):
            continue
        if name not in stored:
            return f"it has no {name}, which is {tuple(tensor.shape)} in the model"
        if stored[name].shape != tensor.shape:
            return f"{name} is {tuple(stored[name].shape)} in the checkpoint and {tuple(tensor.shape)} in the model"
    return None


def _read(directory: Path) -> dict[str, Any]:
    # Not only tensors are in it: Megatron's optimizer states and random states are Python objects.
    return torch.load(directory / _FILE, map_location="cpu", weights_only=False)
