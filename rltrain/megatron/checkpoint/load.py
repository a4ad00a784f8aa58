"""Restoring a checkpoint: on the same ranks, or on others."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from rltrain.megatron.checkpoint.extra_state import drop_absent, load_weights
from rltrain.megatron.checkpoint.legacy import is_legacy, legacy_has_optimizer, load_legacy
from rltrain.megatron.checkpoint.state import (
    BY_LAYER,
    TrainState,
    chunks,
    layout,
    lora_settings,
    optimizer_kind,
    restore_rng,
    sharded_rng_state,
    sharded_tensors,
    sharding,
    state_dict,
)
from rltrain.megatron.device import megatron_scope
from rltrain.megatron.model.layers.lora import is_adapter
from rltrain.megatron.model.names import HEAD
from rltrain.megatron.model.optimizer import fit_chain, load_optimizer
from rltrain.megatron.ranks import first_problem
from rltrain.run.errors import UserError


def load_checkpoint(
    checkpoint: Path, state: TrainState, *, load_rng: bool = True, is_trained: bool = True
) -> int:
    """Restore `state` in place, on any number of ranks. Returns the iteration.

    Without an optimizer only the weights are read; with one also its state, the schedule and random numbers. What is
    not trained loses nothing with a layer for further tokens.

    Raises:
        UserError: the checkpoint is of another model, or its optimizer state does not fit; on every rank.
    """
    if is_legacy(checkpoint):
        _check_same_adapters(checkpoint, state, None)
        return load_legacy(checkpoint, state, load_rng=load_rng)
    stored = dist_checkpointing.load_content_metadata(str(checkpoint)) or {}
    metadata = sharding(stored.get(BY_LAYER, False))
    _check_same_adapters(checkpoint, state, stored.get("lora"))
    _check_same_model(checkpoint, state, metadata, is_trained=is_trained)
    if state.optimizer is not None:
        _check_same_optimizer(checkpoint, stored.get("optimizer_kind"), optimizer_kind(state.optimizer))
    content = state_dict(state, metadata, is_loading=True)
    if state.optimizer is not None and load_rng and stored.get("has_rng", True) and _same_layout(stored):
        content["rng"] = sharded_rng_state()
    with megatron_scope():
        for key, _ in chunks(state):
            drop_absent(content[key], checkpoint)
            if not stored.get("lora"):
                _drop_adapters(content[key])
        loaded = dist_checkpointing.load(content, str(checkpoint))
        for key, model in chunks(state):
            load_weights(model, loaded[key])
        if state.optimizer is not None:
            common = dist_checkpointing.load_common_state_dict(str(checkpoint))["optimizer"]
            load_optimizer(state.optimizer, fit_chain(loaded["optimizer"], common, state.optimizer))
    if state.scheduler is not None:
        state.scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in content:
        restore_rng(loaded["rng"])
    return int(loaded["iteration"])


def has_optimizer(checkpoint: Path) -> bool:
    """Whether the optimizer was saved too."""
    if is_legacy(checkpoint):
        return legacy_has_optimizer(checkpoint)
    return "scheduler" in dist_checkpointing.load_common_state_dict(str(checkpoint))


def _same_layout(stored: dict[str, Any]) -> bool:
    """Random states belong to ranks, so they are of use only for the same parallel sizes."""
    return all(stored.get(key) == value for key, value in layout().items())


def _check_same_optimizer(checkpoint: Path, stored: str | None, wanted: str) -> None:
    if stored not in (None, wanted):
        had, has = ("with", "without") if stored == "distributed" else ("without", "with")
        flag = "--use-distributed-optimizer" if had == "with" else "--no-use-distributed-optimizer"
        raise UserError(
            f"{checkpoint} was saved {had} --use-distributed-optimizer, and this run is {has} it: their states cannot"
            f" be converted into each other. Give {flag} as it had, or --no-load-optim to take the weights only."
        )


def _check_same_adapters(checkpoint: Path, state: TrainState, stored: dict[str, Any] | None) -> None:
    """See that the checkpoint has the model's adapters, or none where only weights are taken.

    Raises:
        UserError: says how it was trained, and what to do.
    """
    own = lora_settings(state)
    if stored == own or (stored is None and state.optimizer is None):
        return
    if stored is None:
        raise UserError(
            f"{checkpoint} was trained without --lora-rank, so its optimizer state cannot be used here. Give --finetune"
            " to begin at rollout 0 with its weights."
        )
    raise UserError(
        f"{checkpoint} was trained with {_lora_flags(stored)}, and this run has {_lora_flags(own)}. Give the same"
        " flags; or let python -m rltrain.tools.convert_torch_dist_to_hf merge it into a Hugging Face directory, and"
        " start from that."
    )


def _lora_flags(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "no adapters"
    return (
        f"--lora-rank {settings['lora_rank']} --lora-alpha {settings['lora_alpha']:g}"
        f" --lora-target-modules {' '.join(settings['lora_target_modules'])}"
    )


def _drop_adapters(content: dict[str, Any]) -> None:
    for name in [name for name in content if is_adapter(name)]:
        del content[name]


def _check_same_model(
    checkpoint: Path, state: TrainState, metadata: dict[str, Any], *, is_trained: bool
) -> None:
    """See that the checkpoint has every weight of the model, in its shape; on all ranks alike.

    Raises:
        UserError: names the first difference, with both shapes.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    if is_trained:
        _check_same_head(checkpoint, state, stored)
    with megatron_scope():
        wanted = {key: model.sharded_state_dict(metadata=metadata) for key, model in chunks(state)}
    for content in wanted.values():  # compared already
        _drop_adapters(content)
    apply_factories(wanted)
    tensors = sorted(sharded_tensors(wanted), key=lambda each: each.key)
    problem = first_problem(_difference(tensors, stored))
    if problem is not None:
        raise UserError(f"{checkpoint} holds a different model from --hf-checkpoint: {problem}.")


def _check_same_head(checkpoint: Path, state: TrainState, stored: Collection[str]) -> None:
    """See that the checkpoint has the layer for one token more where the model has, and only there.

    Raises:
        UserError: says what to do; on every rank.
    """
    has, had = state.has_head, any(key.startswith(HEAD) for key in stored)
    if has and not had:
        raise UserError(
            f"{checkpoint} lacks the MTP layer, which --enable-mtp-training trains. Begin with the weights"
            " of a Hugging Face directory, or convert it by rltrain.tools.convert_hf_to_torch_dist --mtp-num-layers 1."
        )
    if had and not has:
        raise UserError(
            f"{checkpoint} was trained with --enable-mtp-training, and this run does not use it: the checkpoint's MTP"
            " layer would be lost. Give the flag; or let python -m rltrain.tools.convert_torch_dist_to_hf write a"
            " Hugging Face directory, and start from that."
        )


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
