"""The trainer of the policy: one object a rank, which trains on rollouts, saves, and hands out weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from rltrain.algorithms.reduce import token_weights
from rltrain.data.batch import TrainBatch
from rltrain.data.packing import Bin, pack, plan_step
from rltrain.data.trainable import Flat, TrainableTokens
from rltrain.megatron.advantages import advantages
from rltrain.megatron.checkpoint import TrainState, save_checkpoint
from rltrain.megatron.device import device, megatron_scope
from rltrain.megatron.forward_backward import forward_backward, forward_log_probs
from rltrain.megatron.hf_weights import export_hf_weights
from rltrain.megatron.loss import step_metrics
from rltrain.megatron.micro_batch import MicroBatch, build_micro_batch, computed_length
from rltrain.megatron.model import build_model, read_shape, wrap_data_parallel
from rltrain.megatron.optimizer import build_optimizer, build_scheduler
from rltrain.megatron.reference import ReferenceWeights
from rltrain.megatron.start import initial_source, load_source, reference_source, resume
from rltrain.runtime import Registry, RoleContext
from rltrain.weights.disk import EngineClient, push_weights
from rltrain.weights.hf_directory import write_hf_directory


class MegatronTrainActor:
    """Model, optimizer and schedule of one rank. Every method is called by all ranks together.

    Attributes:
        start_rollout_id: The first rollout to train on: 0, or where this run's newest checkpoint ends.
    """

    def __init__(self, args: argparse.Namespace, context: RoleContext, registry: Registry) -> None:
        """Build the model on this rank; `distributed.init_process_group` has run.

        Raises:
            UserError: the model, its weights or the flags cannot be used.
        """
        self.args, self._layout, self._registry = args, context.layout, registry
        self.shape = read_shape(args)
        with megatron_scope():
            self.model = build_model(self.shape, args)
            self._reference = self._load_reference()
            load_source(self.model, self.shape, initial_source(args))
            self.wrapped_model = wrap_data_parallel(self.model, args)
            self.optimizer = build_optimizer(self.wrapped_model, args)
            self.scheduler = build_scheduler(self.optimizer, args)
        done = resume(args, TrainState(self.model, self.optimizer, self.scheduler))
        self.start_rollout_id = done if args.start_rollout_id is None else args.start_rollout_id

    def train(self, rollout_id: int, batch: TrainBatch) -> dict[str, float]:
        """Train on one rollout: --num-steps-per-rollout optimizer steps over its samples, in order.

        Every rank is given the whole batch and computes its own share of it.

        Returns:
            Metrics over the whole batch, the same on every rank; means over the optimizer steps.
        """
        trainable = TrainableTokens.of(batch)
        steps = np.array_split(np.arange(len(batch)), self.args.num_steps_per_rollout)
        plans = [self._plan(batch, trainable, step) for step in steps]
        values = self._token_values(batch, trainable, steps)
        if self.args.loss_type == "policy_loss":
            self._add_policy_values(values, batch, trainable, plans)
        sums, updates = [], []
        for number, plan in enumerate(plans):
            if number == 1:  # after the first step the weights are not those that sampled: nothing to compare
                values.pop("compared_log_probs", None)
            micro_batches = [self._micro_batch(batch, trainable, indices, values) for indices in plan]
            sums.append(forward_backward(self.wrapped_model, micro_batches, self.shape, self.args))
            updates.append(self._optimizer_step())
        metrics = step_metrics(sums, parallel_state.get_data_parallel_group(with_context_parallel=True))
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
            state = TrainState(self.model)
            if not args.no_save_optim:
                state = TrainState(self.model, self.optimizer, self.scheduler)
            checkpoint = save_checkpoint(Path(args.save), rollout_id + 1, state)
            self._event("checkpoint_saved", step=rollout_id + 1, path=str(checkpoint))
        if args.save_hf:
            self.export(Path(args.save_hf.format(rollout_id=rollout_id)))
        return checkpoint

    def export(self, directory: Path) -> None:
        """Write the present weights as a Hugging Face directory; done when rank 0 returns."""
        template = Path(self.args.hf_checkpoint)
        self._stream_weights(lambda tensors: write_hf_directory(directory, tensors, template))

    def update_weights(self, engines: Sequence[EngineClient], version: int) -> None:
        """Have every engine load the present weights; only rank 0 has use for `engines`."""
        if self.args.debug_train_only:
            return
        root, template = self._layout.weights, Path(self.args.hf_checkpoint)
        self._stream_weights(lambda tensors: push_weights(root, version, tensors, template, engines))
        self._event("weights_updated", version=version)

    def _load_reference(self) -> ReferenceWeights | None:
        if self.args.loss_type != "policy_loss" or not (self.args.use_kl_loss or self.args.kl_coef):
            return None
        load_source(self.model, self.shape, reference_source(self.args))
        return ReferenceWeights(self.model)

    def _plan(
        self, batch: TrainBatch, trainable: TrainableTokens, step: NDArray[np.int64]
    ) -> tuple[Bin, ...]:
        """This rank's micro-batches of one optimizer step. Samples that nothing is trained on are left out."""
        samples = [int(i) for i in step if trainable.count(i)]
        plan = plan_step(
            [computed_length(batch.tokens[i]) for i in samples],
            parallel_state.get_data_parallel_world_size(),
            max_tokens=self.args.max_tokens_per_gpu if self.args.use_dynamic_batch_size else None,
            micro_batch_size=self.args.micro_batch_size,
        )
        own = plan.micro_batches[parallel_state.get_data_parallel_rank()]
        return tuple(tuple(samples[i] for i in micro_batch) for micro_batch in own)

    def _token_values(
        self, batch: TrainBatch, trainable: TrainableTokens, steps: list[NDArray[np.int64]]
    ) -> dict[str, Flat]:
        """What the loss needs for each trainable token, as far as it needs no model."""
        per_token = self.args.calculate_per_token_loss
        weights = [token_weights([batch.loss_masks[i] for i in step], per_token=per_token) for step in steps]
        values = {"weights": trainable.spread(np.concatenate(weights))}
        if batch.rollout_log_probs is not None:
            values["rollout_log_probs"] = trainable.select(batch.rollout_log_probs)
            values["compared_log_probs"] = values["rollout_log_probs"]
        if self.args.custom_pg_loss_reducer_function_path:
            counts = [sum(trainable.count(i) for i in step) if per_token else len(step) for step in steps]
            shares = [np.full(len(step), 1 / max(1, n)) for step, n in zip(steps, counts, strict=True)]
            values["normalizer"] = trainable.spread(np.concatenate(shares))
        return values

    def _add_policy_values(
        self,
        values: dict[str, Flat],
        batch: TrainBatch,
        trainable: TrainableTokens,
        plans: list[tuple[Bin, ...]],
    ) -> None:
        """Add log-probs of other policies (the reference; the one before the first step) and the advantages."""
        args = self.args
        samples = [i for plan in plans for micro_batch in plan for i in micro_batch]
        if "rollout_log_probs" not in values and (args.use_rollout_logprobs or args.use_tis):
            flag = "--use-tis" if args.use_tis else "--use-rollout-logprobs"
            raise ValueError(f"{flag}, but the rollout has no log-probs")
        if self._reference is not None:
            with self._reference.in_place_of(self.model):
                values["ref_log_probs"] = self._log_probs(batch, trainable, samples)
        if args.use_rollout_logprobs:
            values["old_log_probs"] = values["rollout_log_probs"]
        elif len(plans) > 1 or args.kl_coef or args.custom_advantage_function_path:
            values["old_log_probs"] = self._log_probs(batch, trainable, samples)
        values["advantages"] = advantages(
            args, batch, trainable, samples, values, parallel_state.get_data_parallel_group()
        )
        if len(plans) == 1 and not args.use_rollout_logprobs:
            # The current log-probs, see `loss.policy_token_loss`: exactly, whatever the micro-batches were.
            values.pop("old_log_probs", None)

    def _log_probs(self, batch: TrainBatch, trainable: TrainableTokens, samples: list[int]) -> Flat:
        """log π of this rank's samples; other samples' entries are empty."""
        if self.args.use_dynamic_batch_size:
            lengths = [computed_length(batch.tokens[i]) for i in samples]
            bins = pack(lengths, self.args.log_probs_max_tokens_per_gpu)
        else:
            size = self.args.micro_batch_size
            bins = [list(range(i, min(i + size, len(samples)))) for i in range(0, len(samples), size)]
        micro_batches = [
            self._micro_batch(batch, trainable, [samples[i] for i in indices], {}) for indices in bins
        ]
        flat: Flat = [np.empty(0, np.float32)] * len(batch)
        if not micro_batches:
            return flat
        temperature = self.args.rollout_temperature
        results = forward_log_probs(self.wrapped_model, micro_batches, self.shape, temperature)
        for micro_batch, log_probs in zip(micro_batches, results, strict=True):
            sizes = [trainable.count(i) for i in micro_batch.indices]
            for i, part in zip(micro_batch.indices, log_probs.cpu().split(sizes), strict=True):
                flat[i] = part.numpy()
        return flat

    def _micro_batch(
        self, batch: TrainBatch, trainable: TrainableTokens, indices: Sequence[int], values: dict[str, Flat]
    ) -> MicroBatch:
        align = self.args.tensor_model_parallel_size if self.args.sequence_parallel else 1
        return build_micro_batch(batch, trainable, indices, values, align=align, device=device())

    def _optimizer_step(self) -> tuple[float, float]:
        """Update the weights with the accumulated gradients and clear these.

        Returns:
            The gradient's norm before clipping, and the learning rate that was used.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]
        with megatron_scope():
            succeeded, grad_norm, _ = self.optimizer.step()
            if not succeeded:
                raise RuntimeError("the optimizer refused the step: gradients are infinite or not a number")
            self.scheduler.step(increment=1)
            self.wrapped_model.zero_grad_buffer()
            self.optimizer.zero_grad()
        return float(grad_norm), learning_rate

    def _stream_weights(self, consume: Callable[[Iterable[tuple[str, Tensor]]], object]) -> None:
        """Gather the weights tensor by tensor; rank 0 consumes them, its tensor parallel peers take part."""
        if parallel_state.get_data_parallel_rank() != 0:
            return
        tensors = export_hf_weights(self.model, self.shape)
        if dist.get_rank() == 0:
            consume(tensors)
        else:
            for _ in tensors:
                pass

    def _event(self, kind: str, **fields: object) -> None:
        if dist.get_rank() == 0:
            self._registry.event(kind, **fields)
