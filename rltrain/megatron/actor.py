"""The trainer: one object a rank, which trains the policy on rollouts, saves, and hands out weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from rltrain.arguments.critic_flags import use_critic
from rltrain.data.batch import TrainBatch
from rltrain.data.trainable import Flat
from rltrain.functions import load_function
from rltrain.megatron.checkpoint_dir import iteration_of
from rltrain.megatron.checkpoint_save import CheckpointWriter
from rltrain.megatron.critic import Critic
from rltrain.megatron.custom_loss import custom_loss
from rltrain.megatron.debug_data import write_train_data
from rltrain.megatron.device import megatron_scope, reset_peak_memory
from rltrain.megatron.forward_backward import forward_log_probs, token_loss
from rltrain.megatron.hf_export import export_hf_weights
from rltrain.megatron.model import build_model, read_shape
from rltrain.megatron.offload import MemoryEngine, Offload
from rltrain.megatron.other_policies import OtherPolicies
from rltrain.megatron.policy_values import add_advantages, add_log_probs, check_rollout
from rltrain.megatron.rank_share import RankShare
from rltrain.megatron.saved_weights import SavedWeights
from rltrain.megatron.speed import measure
from rltrain.megatron.start import (
    WeightSource,
    continued_checkpoint,
    initial_source,
    load_source,
    own_checkpoint,
    resume,
)
from rltrain.megatron.steps import SkippedSteps, prefixed, train_steps
from rltrain.megatron.trained_model import TrainedModel
from rltrain.megatron.trainer_tokens import SeenTokens, TokenWriter, token_columns
from rltrain.megatron.weight_updates import WeightUpdates
from rltrain.runtime import Registry, RoleContext
from rltrain.timing import Timers
from rltrain.weights.hf_directory import write_hf_directory
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
        if args.custom_megatron_init_path:
            load_function(args.custom_megatron_init_path, flag="--custom-megatron-init-path")(args)
        self.shape = read_shape(args)
        self._updates = WeightUpdates(args, context, self._stream_weights, self._event)
        with megatron_scope():
            self.models = build_model(self.shape, args)
            first = self._first_weights()
            self.others = OtherPolicies(args, self.shape, self.models)
            first()
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
        if self.critic is not None and args.swap_critic:
            self.critic.trained.swap.out()
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
            with self._swapped_in(self.critic):
                self.critic.save(iteration)

    def _checkpoint_saved(self, step: int, checkpoint: Path) -> None:
        self._event("checkpoint_saved", step=step, path=str(checkpoint))

    def _checkpoint_failed(self, step: int, reason: str) -> None:
        self._event("checkpoint_failed", step=step, reason=reason)

    def export(self, directory: Path) -> None:
        """Write the present weights as a Hugging Face directory; done when rank 0 returns."""
        template = Path(self.args.hf_checkpoint)
        self._stream_weights(lambda tensors: write_hf_directory(directory, tensors, template))

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

    def log_probs(self, share: RankShare, prefix: str = "") -> Flat:
        """log π of this rank's samples, with the weights that the model has now; other samples' entries are empty.

        Args:
            prefix: Whose weights they are, as slime's hook is told: `ref_`, `teacher_`, or nothing.
        """
        path = self.args.custom_megatron_before_log_prob_hook_path
        if path:
            hook = load_function(path, flag="--custom-megatron-before-log-prob-hook-path")
            hook(self.args, self.policy.wrapped, prefix)
        return share.per_token(
            lambda each: forward_log_probs(
                self.policy.wrapped, each, self.shape, self.args.rollout_temperature
            )
        )

    def _trained_models(self) -> list[TrainedModel]:
        """Those that are in GPU memory while the policy is trained."""
        critic = [self.critic.trained] if self.critic is not None and not self.args.swap_critic else []
        return [self.policy, *critic]

    def _first_weights(self) -> Callable[[], None]:
        """What gives the model the weights that the run starts with, whatever is loaded into it before."""
        source = initial_source(self.args)
        if source == WeightSource():  # the random ones that it has now, and that nothing can load
            return partial(SavedWeights(self.models).give, self.models)
        return partial(load_source, self.models, self.shape, source)

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
        with timers("critic_train"), self._swapped_in(critic):
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
            before=partial(self._before_step, rollout_id),
            after=partial(self._skipped.record, "actor", rollout_id),
        )
        if args.save_trainer_tokens:
            self._tokens.write(rollout_id, share, token_columns(args, seen.collect(share), values))
        return prefixed("train", metrics)

    def _before_step(self, rollout_id: int, step: int) -> None:
        path = self.args.custom_megatron_before_train_step_hook_path
        if path:
            hook = load_function(path, flag="--custom-megatron-before-train-step-hook-path")
            policy = self.policy
            hook(self.args, rollout_id, step, policy.wrapped, policy.optimizer, policy.scheduler)

    @contextmanager
    def _swapped_in(self, critic: Critic) -> Iterator[None]:
        """While entered, the critic is on the GPU, in the policy's place."""
        if not self.args.swap_critic:
            yield
            return
        self.policy.swap.out()
        critic.trained.swap.back()
        try:
            yield
        finally:
            critic.trained.swap.out()
            self.policy.swap.back()

    def _stream_weights(self, consume: Callable[[Iterable[tuple[str, Tensor]]], object]) -> None:
        """Bring the weights to rank 0 bucket by bucket; it consumes them, the others take part."""
        tensors = export_hf_weights(self.models, self.shape)
        if dist.get_rank() == 0:
            consume(tensors)
        else:
            for _ in tensors:
                pass

    def _event(self, kind: str, **fields: object) -> None:
        if dist.get_rank() == 0:
            self._registry.event(kind, **fields)
