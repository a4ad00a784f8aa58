"""Megatron-core's Adam with its learning rate schedule. One step of the schedule is one optimizer step."""

from __future__ import annotations

import argparse

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rltrain.arguments.errors import UserError
from rltrain.megatron.config import build_config
from rltrain.megatron.model import params_dtype


def build_optimizer(models: list[DistributedDataParallel], args: argparse.Namespace) -> MegatronOptimizer:
    """AdamW with gradient clipping; with --use-distributed-optimizer its state is split over ranks."""
    config = build_config(
        OptimizerConfig,
        args,
        optimizer=args.optimizer,
        lr=args.lr,
        min_lr=args.min_lr,  # the schedule reads it from the parameter groups, which get it from here
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        clip_grad=args.clip_grad,
        bf16=args.bf16,
        params_dtype=params_dtype(args),
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    return get_megatron_optimizer(config, models)


def build_scheduler(optimizer: MegatronOptimizer, args: argparse.Namespace) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then --lr-decay-style down to --min-lr.

    Raises:
        UserError: the warm-up is as long as the whole schedule.
    """
    decay_steps = args.lr_decay_iters or (args.num_rollout or 1) * (args.num_steps_per_rollout or 1)
    decay_steps = max(decay_steps, 1)
    warmup_steps = args.lr_warmup_iters
    if args.lr_warmup_fraction is not None:
        warmup_steps = int(args.lr_warmup_fraction * decay_steps)
    if warmup_steps and warmup_steps >= decay_steps:
        raise UserError(
            f"--lr-warmup-iters {warmup_steps} must be smaller than the {decay_steps} optimizer steps"
            " of the schedule (--lr-decay-iters, or --num-rollout times the steps of a rollout)."
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay if args.start_weight_decay is None else args.start_weight_decay,
        end_wd=args.weight_decay if args.end_weight_decay is None else args.end_weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style=args.weight_decay_incr_style,
        wsd_decay_steps=args.lr_wsd_decay_iters,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
        # The flags of this start decide, so that a resumed run can be given another schedule.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
