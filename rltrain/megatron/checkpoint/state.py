"""What a checkpoint holds: weights, optimizer, schedule and random numbers, as this rank has them.

Two formats are built of it: `torch_dist`, which fits any parallel layout, and Megatron's older `torch` (`legacy.py`).
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from rltrain.megatron.device import megatron_scope, use_cuda
from rltrain.megatron.model.layers.mtp import expects_head
from rltrain.megatron.model.optimizer import padding_counted, parts_of

BY_LAYER = "non_homogeneous_layers"  # Megatron-core's name


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

    @property
    def has_head(self) -> bool:
        """Whether the model has a layer for one token more, on whichever rank."""
        return expects_head(self.models[0])


def state_dict(state: TrainState, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """This rank's part of `state`, described so that any other layout can read it."""
    with megatron_scope():
        content: dict[str, Any] = {
            key: model.sharded_state_dict(metadata=metadata) for key, model in chunks(state)
        }
        if state.optimizer is not None:
            with padding_counted(state.optimizer):
                content["optimizer"] = state.optimizer.sharded_state_dict(
                    dict(content), is_loading=is_loading, metadata=metadata
                )
    if state.scheduler is not None:
        content["scheduler"] = state.scheduler.state_dict()
    return content


def chunks(state: TrainState) -> list[tuple[str, GPTModel]]:
    """Chunks and Megatron-LM's names for them. Stored tensors are named by the layer's place in the model."""
    models = state.models
    return [("model" if len(models) == 1 else f"model{i}", model) for i, model in enumerate(models)]


def stored_metadata(state: TrainState, metadata: dict[str, Any], *, has_rng: bool) -> dict[str, Any]:
    """What is said of a checkpoint in itself."""
    return {
        **{key: value for key, value in metadata.items() if key != "dp_cp_group"},
        **layout(),
        "has_rng": has_rng,
        "optimizer_kind": None if state.optimizer is None else optimizer_kind(state.optimizer),
        "lora": lora_settings(state),
    }


def lora_settings(state: TrainState) -> dict[str, Any] | None:
    """How the model's adapters were made, as flags; None if it has none."""
    lora = getattr(state.models[0], "lora", None)
    return None if lora is None else asdict(lora)


def layout() -> dict[str, int]:
    """The sizes that random states, and everything in the legacy format, belong to."""
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def sharding(by_layer: bool) -> dict[str, Any]:
    """How tensors are laid out. Megatron-core's default for the distributed optimizer cannot be loaded."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        BY_LAYER: by_layer,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def optimizer_kind(optimizer: MegatronOptimizer) -> str:
    """States of the two kinds have other tensors, and cannot be turned into each other."""
    return "distributed" if type(parts_of(optimizer)[0]).__name__ == "DistributedOptimizer" else "plain"


def sharded_tensors(tree: Any) -> list[ShardedTensor]:
    """Those in nested dicts and lists; a factory's tensor counts as one."""
    if isinstance(tree, ShardedTensor | ShardedTensorFactory):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for child in children for tensor in sharded_tensors(child)]


def rng_state() -> dict[str, Any]:
    """Every generator's state."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if use_cuda() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def sharded_rng_state() -> ShardedObject:
    """This rank's part of the sharded state."""
    return ShardedObject(
        "rng",
        rng_state(),
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def restore_rng(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`; states of a device of another kind than this one stay as they were seeded."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if (state["cuda"] is not None) != use_cuda():
        return  # a GPU's states are 16 bytes, a CPU's 5056: either refuses the other's
    if use_cuda():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
