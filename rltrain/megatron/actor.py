"""The trainer of the policy: one object a rank, which trains on rollouts, saves, and hands out weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from rltrain.data.batch import TrainBatch
from rltrain.data.trainable import Flat
from rltrain.megatron.advantages import advantages
from rltrain.megatron.checkpoint import save_checkpoint
from rltrain.megatron.device import megatron_scope
from rltrain.megatron.distributed import on_last_stage
from rltrain.megatron.forward_backward import forward_backward, forward_log_probs, policy_loss
from rltrain.megatron.hf_export import export_hf_weights
from rltrain.megatron.loss import step_metrics
from rltrain.megatron.model import build_model, read_shape
from rltrain.megatron.rank_share import RankShare
from rltrain.megatron.reference import ReferenceWeights
from rltrain.megatron.start import initial_source, load_source, reference_source, resume
from rltrain.megatron.trained_model import TrainedModel
from rltrain.runtime import Registry, RoleContext
from rltrain.weights.disk import PushTarget, push_weights
from rltrain.weights.hf_directory import write_hf_directory


class MegatronTrainActor:
    """Model, optimizer and schedule of one rank. Every method is called by all ranks together.

    Attributes:
        start_rollout_id: The first rollout to train on: 0, or where this run's newest checkpoint ends.
        policy: The model that is trained.
    """

    def __init__(self, args: argparse.Namespace, context: RoleContext, registry: Registry) -> None:
        """Build the model on this rank; `distributed.init_process_group` has run.

        Raises:
            UserError: the model, its weights or the flags cannot be used.
        """
        self.args, self._layout, self._registry = args, context.layout, registry
        self.shape = read_shape(args)
        with megatron_scope():
            self.models = build_model(self.shape, args)
            self._reference = self._load_reference()
            load_source(self.models, self.shape, initial_source(args))
        self.policy = TrainedModel(self.models, args)
        done = resume(args, self.policy.full_state())
        self.start_rollout_id = done if args.start_rollout_id is None else args.start_rollout_id

    def train(self, rollout_id: int, batch: TrainBatch) -> dict[str, float]:
        """Train on one rollout: --num-steps-per-rollout optimizer steps over its samples, in order.

        Every rank is given the whole batch and computes its own share of it.

        Returns:
            Metrics over the whole batch, the same on every rank; means over the optimizer steps.
        """
        share = RankShare(self.args, self.shape, batch)
        values = share.loss_values()
        if self.args.loss_type == "policy_loss":
            self._add_policy_values(values, share)
        sums, updates = [], []
        loss = policy_loss(self.shape, self.args)
        for number in range(share.num_steps):
            if number == 1:  # after the first step the weights are not those that sampled: nothing to compare
                values.pop("compared_log_probs", None)
            sums.append(forward_backward(self.policy.wrapped, share.micro_batches(number, values), loss))
            updates.append(self.policy.step())
        metrics = on_last_stage(lambda: step_metrics(sums, parallel_state.get_data_parallel_group()))
        metrics["grad_norm"] = sum(grad_norm for grad_norm, _ in updates) / len(updates)
        metrics["lr"] = updates[-1][1]
        return {f"train/{name}": value for name, value in metrics.items()}

    def save(self, rollout_id: int) -> Path | None:
        """Checkpoint after training on `rollout_id`; also as a Hugging Face directory with --save-hf.

        Returns:
            The checkpoint, or None without --save.
        """
        args, checkpoint = self.args, None
        if args.save:
            checkpoint = save_checkpoint(Path(args.save), rollout_id + 1, self.policy.state())
            self._event("checkpoint_saved", step=rollout_id + 1, path=str(checkpoint))
        if args.save_hf:
            self.export(Path(args.save_hf.format(rollout_id=rollout_id)))
        return checkpoint

    def export(self, directory: Path) -> None:
        """Write the present weights as a Hugging Face directory; done when rank 0 returns."""
        template = Path(self.args.hf_checkpoint)
        self._stream_weights(lambda tensors: write_hf_directory(directory, tensors, template))

    def update_weights(self, find_engines: Callable[[], Sequence[PushTarget]], version: int) -> None:
        """Have every engine load the present weights; only rank 0 asks `find_engines` for them."""
        if self.args.debug_train_only:
            return
        root, template = self._layout.weights, Path(self.args.hf_checkpoint)
        self._stream_weights(lambda tensors: push_weights(root, version, tensors, template, find_engines))
        self._event("weights_updated", version=version)

    def _load_reference(self) -> ReferenceWeights | None:
        if self.args.loss_type != "policy_loss" or not (self.args.use_kl_loss or self.args.kl_coef):
            return None
        load_source(self.models, self.shape, reference_source(self.args))
        return ReferenceWeights(self.models)

    def log_probs(self, share: RankShare) -> Flat:
        """log π of this rank's samples; other samples' entries are empty."""
        return share.per_token(
            lambda each: forward_log_probs(
                self.policy.wrapped, each, self.shape, self.args.rollout_temperature
            )
        )

    def _add_policy_values(self, values: dict[str, Flat], share: RankShare) -> None:
        """Add log-probs of other policies (the reference; the one before the first step) and the advantages."""
        args = self.args
        if "rollout_log_probs" not in values and (args.use_rollout_logprobs or args.use_tis):
            flag = "--use-tis" if args.use_tis else "--use-rollout-logprobs"
            raise ValueError(f"{flag}, but the rollout has no log-probs")
        if self._reference is not None:
            with self._reference.in_place_of(self.models):
                values["ref_log_probs"] = self.log_probs(share)
        if args.use_rollout_logprobs:
            values["old_log_probs"] = values["rollout_log_probs"]
        elif share.num_steps > 1 or args.kl_coef or args.custom_advantage_function_path:
            values["old_log_probs"] = self.log_probs(share)
        values["advantages"] = advantages(
            args,
            share.batch,
            share.trainable,
            share.samples,
            values,
            parallel_state.get_data_parallel_group(),
        )
        if share.num_steps == 1 and not args.use_rollout_logprobs:
            # The current log-probs, see `loss.policy_token_loss`: exactly, whatever the micro-batches were.
            values.pop("old_log_probs", None)

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
