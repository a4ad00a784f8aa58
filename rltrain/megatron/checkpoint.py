"""Checkpoints of the trainer: `torch_dist` directories that are either complete or not there.

`<save>/iter_0000040/` is written under a temporary name, renamed, and then given a `manifest.json` with the
size of every file. A directory without a manifest, or with a file of another size, was cut off and is passed
over when the newest one is looked for. The iteration number is the number of rollouts trained on.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from rltrain.arguments.errors import UserError
from rltrain.megatron.device import megatron_scope, use_cuda

logger = logging.getLogger(__name__)

_ITERATION = re.compile(r"iter_(\d{7,})")
_MANIFEST = "manifest.json"
_LATEST = "latest_checkpointed_iteration.txt"
_BY_LAYER = "non_homogeneous_layers"  # Megatron-core's name


@dataclass
class TrainState:
    """What a checkpoint holds. Without an optimizer only the weights.

    Attributes:
        models: The chunks of the model on this rank.
        partly_trained: The optimizer has only some of the layers. Then each is stored on its own, and not all as
            slices of one tensor, of which some would be missing.
    """

    models: list[GPTModel]
    optimizer: MegatronOptimizer | None = None
    scheduler: OptimizerParamScheduler | None = None
    partly_trained: bool = False


def find_checkpoint(directory: Path, iteration: int | None = None) -> Path | None:
    """The newest complete checkpoint below `directory`, or the one of `iteration`; None if there is none.

    Raises:
        UserError: the checkpoint of the wanted `iteration` is missing or incomplete.
    """
    found = {int(m[1]): path for path in directory.glob("iter_*") if (m := _ITERATION.fullmatch(path.name))}
    complete = sorted(number for number, path in found.items() if is_complete(path))
    if iteration is not None:
        if iteration not in complete:
            raise UserError(
                f"--ckpt-step {iteration}: {directory} has no complete checkpoint of that step; complete are"
                f" {', '.join(map(str, complete)) or 'none'}."
            )
        return found[iteration]
    newest = complete[-1] if complete else None
    cut_off = sorted(number for number in found if newest is None or number > newest)
    if cut_off:
        logger.warning(
            "passed over incomplete checkpoints %s; %s",
            ", ".join(found[number].name for number in cut_off),
            "there is no complete one" if newest is None else f"continuing from {found[newest].name}",
        )
    return None if newest is None else found[newest]


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the manifest lists is there with its full size."""
    try:
        sizes = json.loads((checkpoint / _MANIFEST).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def save_checkpoint(directory: Path, iteration: int, state: TrainState) -> Path:
    """Write a checkpoint; all ranks take part. Returns its directory."""
    final = directory / f"iter_{iteration:07d}"
    temporary = directory / f".{final.name}.tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    metadata = _metadata(state.partly_trained)
    content = _state_dict(state, metadata, is_loading=False)
    content["iteration"] = iteration
    content["rng"] = _rng_state()
    with megatron_scope():
        dist_checkpointing.save(content, str(temporary), content_metadata=_stored(metadata))
    dist.barrier()
    if dist.get_rank() == 0:
        _publish(temporary, final)
        _replace_text(directory / _LATEST, str(iteration))
    dist.barrier()
    return final


def load_checkpoint(checkpoint: Path, state: TrainState) -> int:
    """Restore `state` in place, on any number of ranks. Returns the iteration.

    Without an optimizer only the weights are read; with one also its state, the schedule and random numbers.
    """
    stored = dist_checkpointing.load_content_metadata(str(checkpoint)) or {}
    metadata = _metadata(stored.get(_BY_LAYER, False))
    content = _state_dict(state, metadata, is_loading=True)
    if state.optimizer is not None and _same_layout(checkpoint):
        content["rng"] = _rng_state()
    with megatron_scope():
        loaded = dist_checkpointing.load(content, str(checkpoint))
        for key, model in _chunks(state):
            model.load_state_dict(loaded[key])
        if state.optimizer is not None:
            state.optimizer.load_state_dict(loaded["optimizer"])
    if state.scheduler is not None:
        state.scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in content:
        _restore_rng(loaded["rng"])
    return int(loaded["iteration"])


def has_optimizer(checkpoint: Path) -> bool:
    """Whether the optimizer was saved too."""
    return "scheduler" in dist_checkpointing.load_common_state_dict(str(checkpoint))


def _state_dict(state: TrainState, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    with megatron_scope():
        content: dict[str, Any] = {
            key: model.sharded_state_dict(metadata=metadata) for key, model in _chunks(state)
        }
        if state.optimizer is not None:
            content["optimizer"] = state.optimizer.sharded_state_dict(
                dict(content), is_loading=is_loading, metadata=metadata
            )
    if state.scheduler is not None:
        content["scheduler"] = state.scheduler.state_dict()
    return content


def _chunks(state: TrainState) -> list[tuple[str, GPTModel]]:
    """Chunks and Megatron-LM's names for them. Stored tensors are named by the layer's place in the model."""
    models = state.models
    return [("model" if len(models) == 1 else f"model{i}", model) for i, model in enumerate(models)]


def _metadata(by_layer: bool) -> dict[str, Any]:
    """How tensors are laid out. Megatron-core's default for the distributed optimizer cannot be loaded."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        _BY_LAYER: by_layer,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _stored(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != "dp_cp_group"} | _layout()


def _layout() -> dict[str, int]:
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def _same_layout(checkpoint: Path) -> bool:
    """Random states belong to ranks, so they are of use only for the same parallel sizes."""
    stored = dist_checkpointing.load_content_metadata(str(checkpoint)) or {}
    return all(stored.get(key) == value for key, value in _layout().items())


def _rng_state() -> ShardedObject:
    """Every generator's state, one entry for each model parallel rank."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if use_cuda() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    layout = _layout()
    return ShardedObject(
        "rng",
        state,
        (layout["pipeline_model_parallel_size"], layout["tensor_model_parallel_size"]),
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if use_cuda() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _publish(temporary: Path, final: Path) -> None:
    """Give a finished directory its name, then the manifest that makes it count."""
    files = {
        str(path.relative_to(temporary)): path.stat().st_size
        for path in temporary.rglob("*")
        if path.is_file()
    }
    shutil.rmtree(final, ignore_errors=True)  # cut off in an earlier attempt
    temporary.rename(final)
    _replace_text(final / _MANIFEST, json.dumps({"files": files}, indent=1))
    _sync_directory(final.parent)


def _replace_text(path: Path, text: str) -> None:
    """Write a small file so that it is seen whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
