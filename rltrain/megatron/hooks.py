"""Functions of the user that are called while the trainer works, with slime's signatures."""

from __future__ import annotations

import argparse

from rltrain.functions import load_function
from rltrain.megatron.trained_model import TrainedModel


def at_start(args: argparse.Namespace) -> None:
    """--custom-megatron-init-path, before the model is built."""
    if args.custom_megatron_init_path:
        load_function(args.custom_megatron_init_path, flag="--custom-megatron-init-path")(args)


def before_log_probs(args: argparse.Namespace, trained: TrainedModel, prefix: str) -> None:
    """--custom-megatron-before-log-prob-hook-path; `prefix` says whose: `ref_`, `teacher_`, or nothing."""
    path = args.custom_megatron_before_log_prob_hook_path
    if path:
        load_function(path, flag="--custom-megatron-before-log-prob-hook-path")(args, trained.wrapped, prefix)


def before_step(args: argparse.Namespace, rollout_id: int, trained: TrainedModel, step: int) -> None:
    """--custom-megatron-before-train-step-hook-path, before an optimizer step of a rollout."""
    path = args.custom_megatron_before_train_step_hook_path
    if path:
        hook = load_function(path, flag="--custom-megatron-before-train-step-hook-path")
        hook(args, rollout_id, step, trained.wrapped, trained.optimizer, trained.scheduler)
