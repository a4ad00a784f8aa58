"""Policies beside the one that is trained: the reference, a teacher, and the one that generated the rollout."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.checkpoint import TrainState, load_checkpoint
from rltrain.megatron.checkpoint_save import SaveOptions, save_checkpoint
from rltrain.megatron.saved_weights import PastPolicies, SavedWeights
from rltrain.megatron.start import load_source, matching, reference_source, teacher_source


class OtherPolicies:
    """Those that the flags ask for; all have the model's shape, and use the model itself to compute.

    Attributes:
        reference: For the KL terms.
        teacher: For on-policy distillation.
        past: For --keep-old-actor.
    """

    def __init__(self, args: argparse.Namespace, shape: ModelShape, models: list[GPTModel]) -> None:
        """Load them, one after the other, into a model whose own weights are loaded later.

        Raises:
            UserError: a flag names a directory that holds no weights.
        """
        self._args = args
        self.reference = self.teacher = self.past = None
        if args.loss_type == "sft_loss":
            return
        if args.use_kl_loss or args.kl_coef:
            load_source(models, shape, reference_source(args))
            self.reference = SavedWeights(models)
        if args.opd_teacher_load:
            load_source(models, shape, teacher_source(args))
            self.teacher = SavedWeights(models)
        if args.keep_old_actor:
            self.past = PastPolicies(getattr(args, "max_staleness", 0))

    def after_rollout(self, rollout_id: int, models: list[GPTModel]) -> None:
        """Every --ref-update-interval rollouts the reference becomes what the policy is now."""
        interval = self._args.ref_update_interval
        if interval and self.reference is not None and (rollout_id + 1) % interval == 0:
            self.reference.take(models)

    def save(self, iteration: int, models: list[GPTModel]) -> None:
        """Write the reference, where it is no longer what the run started with."""
        directory = self._directory()
        if directory is not None and self.reference is not None:
            with self.reference.in_place_of(models):
                options = SaveOptions.of_companion(self._args)
                save_checkpoint(directory, iteration, TrainState(models), options)

    def resume(self, iteration: int, models: list[GPTModel]) -> None:
        """Take up the reference that belongs to the policy's checkpoint.

        Raises:
            UserError: there is none of that step.
        """
        directory = self._directory()
        if not iteration or directory is None or self.reference is None:
            return
        checkpoint = matching(directory, iteration)
        with self.reference.in_place_of(models):
            load_checkpoint(checkpoint, TrainState(models))
            self.reference.take(models)

    def _directory(self) -> Path | None:
        keeps = self._args.ref_update_interval and self._args.save
        return Path(self._args.save) / "reference" if keeps else None
