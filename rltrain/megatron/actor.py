"""The trainer: one object a rank, which trains the policy on rollouts, saves, and hands out weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from rltrain.arguments.critic_flags import use_critic
from rltrain.data.batch import TrainBatch
from rltrain.data.trainable import Flat
from rltrain.megatron import hooks
from rltrain.megatron.checkpoint_dir import iteration_of
from rltrain.megatron.checkpoint_save import CheckpointWriter
from rltrain.megatron.critic import Critic
from rltrain.megatron.custom_loss import custom_loss
from rltrain.megatron.debug_data import write_train_data
from rltrain.megatron.device import megatron_scope, reset_peak_memory
from rltrain.megatron.exporter import Exporter
from rltrain.megatron.forward_backward import forward_log_probs, token_loss
from rltrain.megatron.model import build_model, read_shape
from rltrain.megatron.offload import MemoryEngine, Offload
from rltrain.megatron.other_policies import OtherPolicies
from rltrain.megatron.policy_values import add_advantages, add_log_probs, check_rollout
from rltrain.megatron.rank_share import RankShare
from rltrain.megatron.speed import measure
from rltrain.megatron.start import continued_checkpoint, first_weights, own_checkpoint, resume
from rltrain.megatron.steps import SkippedSteps, prefixed, train_steps
from rltrain.megatron.trained_model import TrainedModel
from rltrain.megatron.trainer_tokens import SeenTokens, TokenWriter, token_columns
from rltrain.megatron.weight_updates import WeightUpdates
from rltrain.runtime import Registry, RoleContext
from rltrain.timing import Timers
from rltrain.weights.transport import Engine as WeightsEngine


class Engine(WeightsEngine, MemoryEngine, Protocol):
    """What is needed of an engine."""


class MegatronTrainActor:
    """Model, optimizer and schedule of one rank. Every method is called by all ranks together.

    Attributes:
        start_rollout_id: The first rollout to train on: 0, or where this run's newest checkpoint ends.
        policy: The model that is trained.
        critic: PPO's second model, or None. With a GPU it is in host memory unless it is being used.
        others: The reference and other policies.
        offload: Who has the memory of GPUs that trainer and engines share.
    """

    def __init__(self, args: argparse.Namespace, context: RoleContext, registry: Registry) -> None:
        """Build the model on this rank; `distributed.init_process_group` has run.

        Raises:
            UserError: the model, its weights or the flags cannot be used.
        """
        self.args, self._layout, self._registry = args, context.layout, registry
        hooks.at_start(args)
        self.shape = read_shape(args)
        with megatron_scope():
            self.models = build_model(self.shape, args)
            first = first_weights(args, self.shape, self.models)
            self.others = OtherPolicies(args, self.shape, self.models)
            first()
        self._exporter = Exporter(self.models, self.shape, Path(args.hf_checkpoint))
        self._updates = WeightUpdates(args, context, self._exporter, self._event)
        self.critic = Critic(args, self.shape, self.models) if use_critic(args) else None
        if args.critic_load:  # it may have been read through the policy
            with megatron_scope():
                first()
        self.policy = TrainedModel(self.models, args)
        if args.save:
            self._checkpoints = CheckpointWriter(args, self._checkpoint_saved, self._checkpoint_failed)
        done = self._resume()
        self.start_rollout_id = done if args.start_rollout_id is None else args.start_rollout_id
        self._skipped = SkippedSteps(args.max_skipped_steps, self._event, self.save)
        self._tokens = TokenWriter(
            context, lambda reason: self._event("trainer_tokens_not_saved", reason=reason)
        )
        self.offload = Offload(args, self._trained_models())

    def train(self, rollout_id: int, batch: TrainBatch) -> dict[str, float]:
        """Train on one rollout: --num-steps-per-rollout optimizer steps over its samples, in order.

        Every rank is given the whole batch and computes its own share of it.

        Returns:
            Metrics over the whole batch, the same on every rank; means over the optimizer steps.

        Raises:
            UserError: too many steps in a row had to be skipped; the last good state is saved.
        """
        timers = Timers()
        metrics: dict[str, float] = {}
        self.offload.for_training()
        reset_peak_memory()
        if self.args.save:
            self._checkpoints.poll()
        with timers("train_all"):
            share = RankShare(self.args, self.shape, batch)
            values = share.loss_values()
            if self.args.loss_type != "sft_loss":
                metrics |= self._prepare(rollout_id, share, values, timers)
            if self.args.save_debug_train_data:
                write_train_data(self.args.save_debug_train_data, rollout_id, dist.get_rank(), share, values)
            if self.critic is None or rollout_id >= self.args.num_critic_only_steps:
                with timers("actor_train"):
                    metrics |= self._train_policy(rollout_id, share, values)
        self.others.after_rollout(rollout_id, self.models)
        return metrics | measure(self.shape, share, timers)

    def save(self, rollout_id: int) -> Path | None:
        """Checkpoint after training on `rollout_id`; also as a Hugging Face directory with --save-hf.

        Returns:
            The checkpoint, or None without --save.
        """
        args, checkpoint = self.args, None
        if args.save:
            # The policy's last: a run goes on from the newest of these, and then finds the others.
            checkpoint = self._checkpoints.save(rollout_id + 1, self.policy.state(), self._save_companions)
        if args.save_hf:
            self.export(Path(args.save_hf.format(rollout_id=rollout_id)))
        self._tokens.wait()
        return checkpoint

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written."""
        if self.args.save:
            self._checkpoints.wait()

    def _save_companions(self, iteration: int) -> None:
        self.others.save(iteration, self.models)
        if self.critic is not None:
            with self.critic.in_place_of(self.policy):
                self.critic.save(iteration)

    def _checkpoint_saved(self, step: int, checkpoint: Path) -> None:
        self._event("checkpoint_saved", step=step, path=str(checkpoint))

    def _checkpoint_failed(self, step: int, reason: str) -> None:
        self._event("checkpoint_failed", step=step, reason=reason)

    def export(self, directory: Path) -> None:
        """Write the present weights as a Hugging Face directory; done when this returns."""
        self._exporter.write(directory)

    def update_weights(self, find_engines: Callable[[], Sequence[Engine]], version: int) -> None:
        """Have every engine load the present weights; only rank 0 asks `find_engines` for them."""
        if self.others.past is not None:
            self.others.past.remember(version, self.models)
        if self.args.debug_train_only:
            return
        self.offload.for_push(find_engines)
        self._updates.push(find_engines, version)
        self.offload.for_generating()
        self._event("weights_updated", version=version)

    def lacks_weights(self, find_engines: Callable[[], Sequence[Engine]]) -> bool:
        """Whether there is an engine that needs `update_weights`, as it did not get the last; for rank 0."""
        return self._updates.are_lacked(find_engines)

    def log_probs(self, share: RankShare, prefix: str = "") -> Flat:
        """log π of this rank's samples, with the weights that the model has now; other samples' entries are empty.

        Args:
            prefix: Whose weights they are, as slime's hook is told: `ref_`, `teacher_`, or nothing.
        """
        hooks.before_log_probs(self.args, self.policy, prefix)
        return share.per_token(
            lambda each: forward_log_probs(
                self.policy.wrapped, each, self.shape, self.args.rollout_temperature
            )
        )

    def _trained_models(self) -> list[TrainedModel]:
        """Those that are in GPU memory while the policy is trained."""
        critic = [self.critic.trained] if self.critic is not None and not self.args.swap_critic else []
        return [self.policy, *critic]

    def _resume(self) -> int:
        """Go on from this run's newest checkpoint; returns how many rollouts it was trained on."""
        own = own_checkpoint(self.args)
        iteration = iteration_of(own) if own else 0
        self.others.resume(iteration, self.models)
        if self.critic is not None:
            self.critic.resume(iteration)
        checkpoint = own or continued_checkpoint(self.args)
        return resume(self.args, self.policy.full_state(), checkpoint)  # last: it restores the random numbers

    def _prepare(
        self, rollout_id: int, share: RankShare, values: dict[str, Flat], timers: Timers
    ) -> dict[str, float]:
        """Add what the policy's loss needs, and train the critic; returns the critic's metrics."""
        args, critic = self.args, self.critic
        check_rollout(args, share)
        add_log_probs(args, values, share, self.models, self.log_probs, self.others, rollout_id, timers)
        if critic is None:
            add_advantages(args, values, share)
            return {}
        after = partial(self._skipped.record, "critic", rollout_id)
        with timers("critic_train"), critic.in_place_of(self.policy):
            values["old_values"] = critic.values(share)
            add_advantages(args, values, share)
            metrics = critic.train(share, values, after)
        return prefixed("critic", metrics)

    def _train_policy(self, rollout_id: int, share: RankShare, values: dict[str, Flat]) -> dict[str, float]:
        args, seen = self.args, SeenTokens()
        if args.reset_optimizer_states:
            self.policy.forget_averages()
        is_custom = args.loss_type == "custom_loss"
        loss = custom_loss(self.shape, args) if is_custom else token_loss(self.shape, args, seen.note)
        metrics = train_steps(
            self.policy,
            share,
            values,
            loss,
            before=partial(hooks.before_step, args, rollout_id, self.policy),
            after=partial(self._skipped.record, "actor", rollout_id),
        )
        if args.save_trainer_tokens:
            self._tokens.write(rollout_id, share, token_columns(args, seen.collect(share), values))
        return prefixed("train", metrics)

    def _event(self, kind: str, **fields: object) -> None:
        if dist.get_rank() == 0:
            self._registry.event(kind, **fields)
