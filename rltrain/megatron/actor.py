"""The trainer: one object a rank, which trains the policy on rollouts, saves, and hands out weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from rltrain.arguments.config import Config
from rltrain.arguments.groups.critic import use_critic
from rltrain.data.batch import Flat, TrainBatch
from rltrain.megatron import routing_replay
from rltrain.megatron.checkpoint.directory import iteration_of
from rltrain.megatron.checkpoint.peft_files import write_adapters
from rltrain.megatron.checkpoint.resume import (
    WeightSource,
    check_trusted,
    continued_checkpoint,
    first_weights,
    initial_source,
    own_checkpoint,
    resume,
)
from rltrain.megatron.checkpoint.save import CheckpointWriter
from rltrain.megatron.custom_loss import custom_loss
from rltrain.megatron.device import megatron_scope, reset_peak_memory
from rltrain.megatron.exporter import Exporter
from rltrain.megatron.memory import EngineMemory, MemoryEngine, Offload
from rltrain.megatron.model import customize
from rltrain.megatron.model.build import build_model, read_shape
from rltrain.megatron.profile import Profiler
from rltrain.megatron.push import WeightPush
from rltrain.megatron.training.advantages import entropy_metrics, with_advantages
from rltrain.megatron.training.critic import Critic
from rltrain.megatron.training.forward_backward import (
    forward_log_probs,
    forward_log_probs_and_entropy,
    token_loss,
)
from rltrain.megatron.training.micro_batch import LossInputs, MicroBatch, computed_length
from rltrain.megatron.training.other_policies import OtherPolicies, check_rollout
from rltrain.megatron.training.recording import SeenTokens, TokenWriter, token_columns, write_train_data
from rltrain.megatron.training.rollout_data import post_processes
from rltrain.megatron.training.share import RankShare
from rltrain.megatron.training.speed import measure
from rltrain.megatron.training.steps import SkippedSteps, prefixed, train_steps
from rltrain.megatron.training.trained_model import TrainedModel
from rltrain.run.errors import UserError
from rltrain.run.role import Registry, RoleContext
from rltrain.run.timing import Timers
from rltrain.weights.engine import Engine as WeightsEngine


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

    def __init__(
        self,
        config: Config,
        context: RoleContext,
        registry: Registry,
        engine_memory: EngineMemory | None = None,
        profiler: Profiler | None = None,
    ) -> None:
        """Build the model on this rank; `distributed.init_process_group` has run.

        Args:
            config: resolved.
            context: the role's.
            registry: the job's.
            engine_memory: what engines on the same GPUs have given up already.
            profiler: this rank's.

        Raises:
            UserError: the model, its weights or the flags cannot be used.
        """
        check_trusted(config)
        config = customize.call_at_start(config)
        self.config, self._layout, self._registry = config, context.layout, registry
        self._profiler = profiler or Profiler(config.profiling, config.tracking, context)
        self.shape = read_shape(config, context.layout.standard_config)
        with megatron_scope():
            self.models = build_model(self.shape, config)
            first = first_weights(config.checkpoint, config.model, self.shape, self.models)
            self.others = OtherPolicies(config, self.shape, self.models)
            first()
        if config.algorithm.use_routing_replay or config.algorithm.use_rollout_routing_replay:
            routing_replay.install(self.models)
        self._exporter = Exporter(self.models, self.shape, Path(config.model.hf_checkpoint))
        self._weight_push = WeightPush(config, context, self._exporter, self._event)
        self.critic = Critic(config, self.shape, self.models) if use_critic(config.algorithm) else None
        if config.critic.critic_load:  # it may have been read through the policy
            with megatron_scope():
                first()
        self.policy = TrainedModel(self.models, config)
        if config.checkpoint.save:
            self._checkpoints = CheckpointWriter(
                config.checkpoint, self._checkpoint_saved, self._checkpoint_failed
            )
        done = self._resume()
        self.start_rollout_id = (
            done if config.rollout.start_rollout_id is None else config.rollout.start_rollout_id
        )
        self._skipped = SkippedSteps(config.training.max_skipped_steps, self._event, self.save)
        self._tokens = TokenWriter(
            context, lambda reason: self._event("trainer_tokens_not_saved", reason=reason)
        )
        memory = engine_memory or EngineMemory(config.engines, config.debug)
        self.offload = Offload(config.engines, self._trained_models(), memory)

    def train(self, rollout_id: int, batch: TrainBatch) -> dict[str, float]:
        """Train on one rollout: --num-steps-per-rollout optimizer steps over its samples, in order.

        Every rank is given the whole batch and computes its own share of it.

        Returns:
            Metrics over the whole batch, the same on every rank; means over the optimizer steps.

        Raises:
            UserError: too many steps in a row had to be skipped; the last good state is saved.
        """
        with self._profiler.rollout(rollout_id):
            return self._train(rollout_id, batch)

    def _train(self, rollout_id: int, batch: TrainBatch) -> dict[str, float]:
        timers = Timers()
        metrics: dict[str, float] = {}
        self.offload.for_training()
        reset_peak_memory()
        if self.config.checkpoint.save:
            self._checkpoints.poll()
        with timers("train_all"):
            share = RankShare(self.config, self.shape, batch)
            inputs = share.loss_inputs()
            if self.config.algorithm.loss_type != "sft_loss":
                inputs, metrics = self._prepare(rollout_id, share, inputs, timers)
            elif post_processes(self.config.functions):
                raise UserError(
                    "--rollout-data-postprocess-path: with --loss-type sft_loss it takes (args, groups), because the"
                    " trainer keeps no other data of the samples."
                )
            if self.config.debug.save_debug_train_data:
                write_train_data(
                    self.config.debug.save_debug_train_data, rollout_id, dist.get_rank(), share, inputs
                )
            if self.critic is None or rollout_id >= self.config.critic.num_critic_only_steps:
                with timers("actor_train"), self._profiler.part("train_actor"):
                    metrics |= self._train_policy(rollout_id, share, inputs)
        self.others.after_rollout(rollout_id)
        return metrics | measure(share, timers)

    def save(self, rollout_id: int) -> Path | None:
        """Checkpoint after training on `rollout_id`; also as a Hugging Face directory with --save-hf.

        Returns:
            The checkpoint, or None without --save.
        """
        config, checkpoint = self.config, None
        self.offload.for_saving()
        if config.checkpoint.save:
            # The policy's last: a run goes on from the newest of these, and then finds the others.
            checkpoint = self._checkpoints.save(rollout_id + 1, self.policy.state(), self._save_companions)
        if config.checkpoint.save_hf:
            self.export(Path(config.checkpoint.save_hf.format(rollout_id=rollout_id)))
        self._tokens.wait()
        return checkpoint

    def finish(self) -> str | None:
        """Wait for a checkpoint that is still being written; returns why the last weights are not saved, if so."""
        if not self.config.checkpoint.save:
            return None
        self._checkpoints.wait()
        return self._checkpoints.unsaved

    def _save_companions(self, iteration: int) -> None:
        self.others.save(iteration)
        if self.critic is not None:
            with self.critic.in_place_of(self.policy):
                self.critic.save(iteration)

    def _checkpoint_saved(self, step: int, checkpoint: Path) -> None:
        self._event("checkpoint_saved", step=step, path=str(checkpoint))

    def _checkpoint_failed(self, step: int, reason: str) -> None:
        self._event("checkpoint_failed", step=step, reason=reason)

    def export(self, directory: Path) -> None:
        """Write the present weights as a Hugging Face directory; done when this returns.

        With adapters these are merged, and in `adapter/` of it alone: beside the weights transformers would add them.
        """
        self._exporter.write(directory)
        if self.config.lora.lora_rank:
            write_adapters(directory / "adapter", self.models, self.shape, self.config)

    def update_weights(self, find_engines: Callable[[], Sequence[Engine]], version: int) -> None:
        """Have every engine load the present weights; only rank 0 asks `find_engines` for them."""
        pushes = not self.config.debug.debug_train_only
        if pushes:
            self.offload.for_push(find_engines)
        if self.others.past is not None:  # which reads the weights, so not while they are away
            self.others.past.remember(version, self.models)
        if not pushes:
            return
        self._weight_push.push(find_engines, version)
        self.offload.for_generating()
        self._event("weights_updated", version=version)

    def lacks_weights(self, find_engines: Callable[[], Sequence[Engine]]) -> bool:
        """Whether there is an engine that needs `update_weights` because it missed the last one; for rank 0."""
        return self._weight_push.is_lacked(find_engines)

    def log_probs(self, share: RankShare, prefix: str = "") -> Flat:
        """See `log_probs_and_entropy`."""
        return self.log_probs_and_entropy(share, prefix)[0]

    def log_probs_and_entropy(self, share: RankShare, prefix: str = "") -> tuple[Flat, Flat | None]:
        """log π of this rank's samples, with the weights that the model has now; other samples' entries are empty.

        With --use-rollout-entropy also the entropy of the distributions that the tokens were sampled from.

        Args:
            prefix: Whose weights they are, as slime's hook is told: `ref_`, `teacher_`, or nothing.
        """
        customize.call_before_log_probs(self.config, self.policy.wrapped, prefix)
        with_entropy = self.config.algorithm.use_rollout_entropy
        compute = forward_log_probs_and_entropy if with_entropy else forward_log_probs

        def forward(micro_batches: list[MicroBatch]) -> list[Tensor]:
            return compute(self.policy.wrapped, micro_batches, self.shape, self.config)

        if prefix or not self.config.algorithm.use_routing_replay:
            found = share.per_token(forward, None if prefix else share.routes)
        else:
            with routing_replay.recording(self.models):
                found = share.per_token(lambda each: self._recorded(share, each, forward(each)))
        if not with_entropy:
            return found, None
        first, second = ([each[..., i] if each.size else each for each in found] for i in (0, 1))
        return first, second

    def _recorded(
        self, share: RankShare, micro_batches: list[MicroBatch], values: list[Tensor]
    ) -> list[Tensor]:
        """The values; the experts that the micro-batches' tokens were sent to are those of the passes that follow."""
        lengths = [computed_length(tokens) for tokens in share.batch.tokens]
        share.routes = routing_replay.recorded_routes(
            self.models, micro_batches, lengths, self.shape.num_layers
        )
        return values

    def _trained_models(self) -> list[TrainedModel]:
        """Those that are in GPU memory while the policy is trained."""
        critic = (
            [self.critic.trained] if self.critic is not None and not self.config.critic.swap_critic else []
        )
        return [self.policy, *critic]

    def _resume(self) -> int:
        """Go on from this run's newest checkpoint; returns how many rollouts it was trained on."""
        own = own_checkpoint(self.config.checkpoint)
        iteration = iteration_of(own) if own else 0
        self.others.resume(iteration)
        if self.critic is not None:
            self.critic.resume(iteration)
        if own:
            source = WeightSource(checkpoint=own, flag="--save")
        else:
            source = initial_source(self.config.checkpoint, self.config.model)
        if dist.get_rank() == 0:
            print(f"the policy's weights come from {source}", flush=True)
        checkpoint = continued_checkpoint(self.config.checkpoint, source)
        return resume(
            self.config.checkpoint, self.policy.full_state(), checkpoint
        )  # last: it restores the random numbers

    def _prepare(
        self, rollout_id: int, share: RankShare, inputs: LossInputs[Flat], timers: Timers
    ) -> tuple[LossInputs[Flat], dict[str, float]]:
        """What the policy's loss needs beside the batch; the critic is trained. And the metrics of both."""
        config, critic = self.config, self.critic
        check_rollout(config.algorithm, share)
        with self._profiler.part("train_log_probs"):
            inputs = self.others.add_log_probs(inputs, share, self.log_probs_and_entropy, rollout_id, timers)
        metrics = entropy_metrics(share, inputs)
        if critic is None:
            return with_advantages(config, share, inputs, rollout_id), metrics
        after = partial(self._skipped.record, "critic", rollout_id)
        with timers("critic_train"), critic.in_place_of(self.policy):
            inputs = with_advantages(
                config, share, replace(inputs, old_values=critic.values(share)), rollout_id
            )
            trained = critic.train(share, inputs, after)
        return inputs, metrics | prefixed("critic", trained)

    def _train_policy(self, rollout_id: int, share: RankShare, inputs: LossInputs[Flat]) -> dict[str, float]:
        config, policy, seen = self.config, self.policy, SeenTokens()
        if config.training.reset_optimizer_states:
            policy.forget_averages()
        is_custom = config.algorithm.loss_type == "custom_loss"
        loss = custom_loss(self.shape, config) if is_custom else token_loss(self.shape, config, seen.note)
        metrics = train_steps(
            policy,
            share,
            inputs,
            loss,
            before=lambda step: customize.call_before_step(
                config, rollout_id, step, policy.wrapped, policy.optimizer, policy.scheduler
            ),
            after=partial(self._skipped.record, "actor", rollout_id),
        )
        if config.training.save_trainer_tokens:
            self._tokens.write(
                rollout_id, share, token_columns(config.algorithm, seen.collect(share), inputs)
            )
        return prefixed("train", metrics)

    def _event(self, kind: str, **fields: object) -> None:
        if dist.get_rank() == 0:
            self._registry.event(kind, **fields)
