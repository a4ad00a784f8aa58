"""Megatron-core's Adam with its learning rate schedule, and what its checkpoints need to fit other layouts.

One step of the schedule is one optimizer step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rltrain.arguments.config import Config
from rltrain.arguments.megatron_names import given
from rltrain.megatron.core_config import build_config
from rltrain.megatron.device import use_cuda
from rltrain.megatron.model.build import params_dtype
from rltrain.run.errors import UserError

# What tells a group from others, beside whether its parameters are experts.
_IDENTITY = ("wd_mult", "lr_mult", "is_decoupled_lr")


def build_optimizer(models: list[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """AdamW with gradient clipping; with --use-distributed-optimizer its state is split over ranks.

    Raises:
        UserError: --optimizer-cpu-offload where everything is in host memory already.
    """
    flags = config.optimizer
    if not use_cuda() and given(config.model, "optimizer").get("optimizer_cpu_offload"):
        raise UserError("--optimizer-cpu-offload is for GPUs: the trainer is on the CPU. Leave it out.")
    settings = build_config(
        OptimizerConfig,
        config.model,
        optimizer=flags.optimizer,
        lr=flags.lr,
        min_lr=flags.min_lr,  # the schedule reads it from the parameter groups, which get it from here
        weight_decay=flags.weight_decay,
        adam_beta1=flags.adam_beta1,
        adam_beta2=flags.adam_beta2,
        adam_eps=flags.adam_eps,
        clip_grad=flags.clip_grad,
        bf16=bool(config.model.bf16),
        params_dtype=params_dtype(config.model),
        use_distributed_optimizer=bool(config.parallel.use_distributed_optimizer),
    )
    optimizer = get_megatron_optimizer(settings, models)
    if not use_cuda():
        _fuse(optimizer)
    return optimizer


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that Megatron-core chains, of dense parameters and of experts for example; else this one alone."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _fuse(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam pass over memory once a step, which it does by itself on GPUs only."""
    for each in parts_of(optimizer):
        if isinstance(each.optimizer, torch.optim.Adam):  # AdamW is one, too
            for group in each.param_groups:
                group["fused"] = True


def _given(value: float | None, usual: float) -> float:
    return usual if value is None else value


def build_scheduler(optimizer: MegatronOptimizer, config: Config) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then --lr-decay-style down to --min-lr.

    Raises:
        UserError: the warm-up is as long as the whole schedule.
    """
    flags, rollouts = config.optimizer, config.rollout.num_rollout or 1
    steps = rollouts * config.training.num_steps_per_rollout
    decay_steps = max(flags.lr_decay_iters or steps, 1)
    warmup_steps = flags.lr_warmup_iters
    if flags.lr_warmup_fraction is not None:
        warmup_steps = int(flags.lr_warmup_fraction * decay_steps)
    if not config.rollout.num_rollout:  # it only evaluates
        warmup_steps = 0
    if warmup_steps and warmup_steps >= decay_steps:
        raise UserError(
            f"--lr-warmup-iters {warmup_steps} must be smaller than the {decay_steps} optimizer steps"
            " of the schedule (--lr-decay-iters, or --num-rollout times the steps of a rollout)."
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=flags.lr_warmup_init,
        max_lr=flags.lr,
        min_lr=flags.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=flags.lr_decay_style,
        start_wd=_given(flags.start_weight_decay, flags.weight_decay),
        end_wd=_given(flags.end_weight_decay, flags.weight_decay),
        wd_incr_steps=decay_steps,
        wd_incr_style=flags.weight_decay_incr_style,
        wsd_decay_steps=flags.lr_wsd_decay_iters,
        lr_wsd_decay_style=flags.lr_wsd_decay_style,
        # The flags of this start decide, so that a resumed run can be given another schedule.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def load_optimizer(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Load a state, but not the learning rates, betas and the like in it: the flags of this start decide them."""
    own = parts_of(optimizer)
    parts = [state[number] for number in range(len(own))] if len(own) > 1 else [state]
    for part, each in zip(parts, own, strict=True):
        current = {_group_identity(group): group for group in each.param_groups}
        # Megatron-core from 0.19 on finds a group by its learning rates, too.
        for group in _param_groups(part):
            group.update(_hyperparameters(current.get(_group_identity(group), {})))
    kept = [_hyperparameters(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    state = ("params", "step", "lr", "weight_decay")  # the schedule sets the last two
    return {key: value for key, value in group.items() if key not in state}


def fit_chain(loaded: dict[Any, Any], common: dict[Any, Any], optimizer: MegatronOptimizer) -> dict[Any, Any]:
    """The state for `optimizer.load_state_dict`, from a model with or without expert parallelism.

    With it Megatron-core has two optimizers, one for the experts; without it one for everything. Their tensors are
    stored by parameter and fit either way. What is common to a group of parameters (the number of steps, …) is
    stored by optimizer, and is taken from where it is.

    Args:
        loaded: What Megatron-core makes of a checkpoint with another number of optimizers: this one's tensors
            mixed with the other one's common values.
        common: The common values alone, as they were stored.
    """
    stored = _optimizers(common)
    own = parts_of(optimizer)
    if len(stored) == len(own):
        return loaded
    groups = {_group_identity(group): group for part in reversed(stored) for group in _param_groups(part)}
    fitted = {}
    for number, each in enumerate(own):
        part = (
            loaded[number]
            if len(own) > 1
            else {key: value for key, value in loaded.items() if not isinstance(key, int)}
        )
        _add_missing(part, stored[0])
        holder = part if "param_groups" in stored[0] else part["optimizer"]
        # A distributed optimizer keeps no list of parameters with a group, so there may be nothing of its own.
        holder.setdefault("param_groups", [{} for _ in each.param_groups])
        for group, current in zip(holder["param_groups"], each.param_groups, strict=True):
            taken = copy.deepcopy(
                {key: value for key, value in groups[_group_identity(current)].items() if key != "params"}
            )
            group.update(taken, is_expert_parallel=current["is_expert_parallel"])
        fitted[number] = part
    return fitted if len(own) > 1 else fitted[0]


def _optimizers(state: dict[Any, Any]) -> list[dict[Any, Any]]:
    numbers = sorted(key for key in state if isinstance(key, int))
    return [state[number] for number in numbers] or [state]


def _param_groups(part: dict[Any, Any]) -> list[dict[str, Any]]:
    return part["param_groups"] if "param_groups" in part else part["optimizer"]["param_groups"]


def _group_identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _IDENTITY)


def _add_missing(part: dict[Any, Any], common: dict[Any, Any]) -> None:
    """Add common values that are missing; groups of parameters are filled one by one."""
    for key, value in common.items():
        if isinstance(value, dict):
            _add_missing(part.setdefault(key, {}), value)
        elif key != "param_groups":
            part.setdefault(key, copy.deepcopy(value))


@contextmanager
def padding_counted(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While entered, the padding between buckets of a distributed optimizer's gradient buffer counts as content.

    It repairs reshardable checkpoints of several buckets: a tied embedding has one of its own where pipeline stages
    share it. Megatron-core (up to 0.19.2) gathers the optimizer's state without the padding at the end of each
    bucket, but looks parameters up where they are with it. Those behind a padded bucket get their neighbours'
    numbers, weights included, and nothing complains.

    Also right for a Megatron-core without the defect: it then finds no padding to leave out.
    """
    buffers = [buffer for part in parts_of(optimizer) for buffer in getattr(part, "buffers", [])]
    before = [(each, each.numel_unpadded) for buffer in buffers for each in (buffer, *buffer.buckets)]
    for buffer in buffers:
        for bucket in buffer.buckets[:-1]:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)
    try:
        yield
    finally:
        for each, numel in before:
            each.numel_unpadded = numel
