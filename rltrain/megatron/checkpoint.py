"""What a checkpoint holds, and restoring it: on the same ranks, or on others.

Two formats are read: `torch_dist`, which fits any parallel layout, and Megatron's older `torch`
(`checkpoint_torch.py`). Writing is in `checkpoint_save.py`, directories are in `checkpoint_dir.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rltrain.arguments.errors import UserError
from rltrain.megatron.agreement import first_problem
from rltrain.megatron.checkpoint_rng import restore_rng, sharded_rng_state
from rltrain.megatron.device import megatron_scope
from rltrain.megatron.optimizer_buckets import padding_counted
from rltrain.megatron.optimizer_chain import fit_chain

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


def load_checkpoint(checkpoint: Path, state: TrainState, *, load_rng: bool = True) -> int:
    """Restore `state` in place, on any number of ranks. Returns the iteration.

    Without an optimizer only the weights are read; with one also its state, the schedule and random numbers.

    Raises:
        UserError: the checkpoint is of another model, or its optimizer state does not fit; on every rank.
    """
    if is_legacy(checkpoint):
        from rltrain.megatron.checkpoint_torch import load_legacy

        return load_legacy(checkpoint, state, load_rng=load_rng)
    stored = dist_checkpointing.load_content_metadata(str(checkpoint)) or {}
    metadata = sharding(stored.get(_BY_LAYER, False))
    _check_same_model(checkpoint, state, metadata)
    if state.optimizer is not None:
        _check_same_optimizer(checkpoint, stored.get("optimizer_kind"), _optimizer_kind(state.optimizer))
    content = state_dict(state, metadata, is_loading=True)
    if state.optimizer is not None and load_rng and stored.get("has_rng", True) and _same_layout(stored):
        content["rng"] = sharded_rng_state()
    with megatron_scope():
        loaded = dist_checkpointing.load(content, str(checkpoint))
        for key, model in chunks(state):
            model.load_state_dict(loaded[key])
        if state.optimizer is not None:
            common = dist_checkpointing.load_common_state_dict(str(checkpoint))["optimizer"]
            state.optimizer.load_state_dict(fit_chain(loaded["optimizer"], common, state.optimizer))
    if state.scheduler is not None:
        state.scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in content:
        restore_rng(loaded["rng"])
    return int(loaded["iteration"])


def has_optimizer(checkpoint: Path) -> bool:
    """Whether the optimizer was saved too."""
    if is_legacy(checkpoint):
        from rltrain.megatron.checkpoint_torch import legacy_has_optimizer

        return legacy_has_optimizer(checkpoint)
    return "scheduler" in dist_checkpointing.load_common_state_dict(str(checkpoint))


def is_legacy(checkpoint: Path) -> bool:
    """Whether it is in Megatron's `torch` format: one directory a model parallel rank."""
    return any(checkpoint.glob("mp_rank_*"))


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
        "optimizer_kind": None if state.optimizer is None else _optimizer_kind(state.optimizer),
    }


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
        _BY_LAYER: by_layer,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _same_layout(stored: dict[str, Any]) -> bool:
    """Random states belong to ranks, so they are of use only for the same parallel sizes."""
    return all(stored.get(key) == value for key, value in layout().items())


def _optimizer_kind(optimizer: MegatronOptimizer) -> str:
    """States of the two kinds have other tensors, and cannot be turned into each other."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return "distributed" if type(chained[0]).__name__ == "DistributedOptimizer" else "plain"


def _check_same_optimizer(checkpoint: Path, stored: str | None, wanted: str) -> None:
    if stored not in (None, wanted):
        had, has = ("with", "without") if stored == "distributed" else ("without", "with")
        raise UserError(
            f"{checkpoint} was saved {had} --use-distributed-optimizer, and this run is {has} it: their states cannot"
            f" be turned into each other. Start {had} the flag too, or give --no-load-optim to take the weights only."
        )


def _check_same_model(checkpoint: Path, state: TrainState, metadata: dict[str, Any]) -> None:
    """See that the checkpoint has every weight of the model, in its shape; on all ranks alike.

    Raises:
        UserError: names the first difference, with both shapes.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    with megatron_scope():
        wanted = {key: model.sharded_state_dict(metadata=metadata) for key, model in chunks(state)}
    apply_factories(wanted)
    tensors = sorted(sharded_tensors(wanted), key=lambda each: each.key)
    problem = first_problem(_difference(tensors, stored))
    if problem is not None:
        raise UserError(f"{checkpoint} is of another model than --hf-checkpoint: {problem}.")


def _difference(wanted: list[ShardedTensor], stored: dict[str, Any]) -> str | None:
    for tensor in wanted:
        found = stored.get(tensor.key)
        if found is None:
            return f"it has no {tensor.key}, which is {tuple(tensor.global_shape)} in the model"
        if tuple(found.global_shape) != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch:
            return (
                f"{tensor.key} is {tuple(found.global_shape)} in the checkpoint and"
                f" {tuple(tensor.global_shape)} in the model"
            )
    return None


def sharded_tensors(tree: Any) -> list[ShardedTensor]:
    """Those in nested dicts and lists; a factory's tensor counts as one."""
    if isinstance(tree, ShardedTensor | ShardedTensorFactory):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for child in children for tensor in sharded_tensors(child)]
