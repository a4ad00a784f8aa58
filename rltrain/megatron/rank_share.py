"""A rollout as one rank trains on it: its samples, in optimizer steps and micro-batches."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from rltrain.algorithms.reduce import token_weights
from rltrain.data.batch import TrainBatch
from rltrain.data.packing import Bin, pack, plan_step
from rltrain.data.trainable import Flat, TrainableTokens
from rltrain.megatron.device import device
from rltrain.megatron.micro_batch import MicroBatch, build_micro_batch, computed_length


class RankShare:
    """Every rank is given the whole batch and computes the same plan; this is its own part of it.

    Attributes:
        batch: All samples of the rollout.
        trainable: Where their trainable tokens are.
        plans: One an optimizer step: this rank's micro-batches, as indices of samples.
        samples: This rank's samples. Those that nothing is trained on are nobody's.
    """

    def __init__(self, args: argparse.Namespace, batch: TrainBatch) -> None:
        """Share a rollout out over the data parallel ranks."""
        self._args, self.batch = args, batch
        self.trainable = TrainableTokens.of(batch)
        self._steps = batch.steps(args.num_steps_per_rollout)
        self.plans = [self._plan(step) for step in self._steps]
        self.samples = [i for plan in self.plans for micro_batch in plan for i in micro_batch]

    def loss_values(self) -> dict[str, Flat]:
        """What the loss needs for each trainable token, as far as it needs no model."""
        per_token, batch, trainable = self._args.calculate_per_token_loss, self.batch, self.trainable
        weights = [
            token_weights(
                [batch.loss_masks[i] for i in step], per_token=per_token, rollout_ids=batch.rollouts(step)
            )
            for step in self._steps
        ]
        values = {"weights": trainable.spread(self._per_sample(weights))}
        if batch.rollout_log_probs is not None:
            values["rollout_log_probs"] = trainable.select(batch.rollout_log_probs)
        if batch.comparable_log_probs is not None:
            values["compared_log_probs"] = trainable.select(batch.comparable_log_probs)
        if self._args.custom_pg_loss_reducer_function_path:
            counts = [
                sum(trainable.count(i) for i in step) if per_token else len(set(batch.rollouts(step)))
                for step in self._steps
            ]
            shares = [np.full(len(step), 1 / max(1, n)) for step, n in zip(self._steps, counts, strict=True)]
            values["normalizer"] = trainable.spread(self._per_sample(shares))
        return values

    def micro_batches(self, step: int, values: dict[str, Flat]) -> list[MicroBatch]:
        """The micro-batches of an optimizer step, with these values of their tokens."""
        return [self._micro_batch(indices, values) for indices in self.plans[step]]

    def per_token(self, forward: Callable[[list[MicroBatch]], list[Tensor]]) -> Flat:
        """What `forward` returns for the trainable tokens of this rank; other samples' entries are empty.

        Args:
            forward: From micro-batches, packed as there is room without gradients, to their [n] values each.
        """
        flat: Flat = [np.empty(0, np.float32)] * len(self.batch)
        micro_batches = [self._micro_batch(indices, {}) for indices in self._forward_plan()]
        if not micro_batches:
            return flat
        for micro_batch, values in zip(micro_batches, forward(micro_batches), strict=True):
            sizes = [self.trainable.count(i) for i in micro_batch.indices]
            for i, part in zip(micro_batch.indices, values.cpu().split(sizes), strict=True):
                flat[i] = part.numpy()
        return flat

    def _per_sample(self, of_steps: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """One value a sample, from the values of each step's samples."""
        values = np.zeros(len(self.batch))
        for step, part in zip(self._steps, of_steps, strict=True):
            values[step] = part
        return values

    def _plan(self, step: NDArray[np.int64]) -> tuple[Bin, ...]:
        samples = [int(i) for i in step if self.trainable.count(i)]
        plan = plan_step(
            [computed_length(self.batch.tokens[i]) for i in samples],
            parallel_state.get_data_parallel_world_size(),
            max_tokens=self._args.max_tokens_per_gpu if self._args.use_dynamic_batch_size else None,
            micro_batch_size=self._args.micro_batch_size,
        )
        own = plan.micro_batches[parallel_state.get_data_parallel_rank()]
        return tuple(tuple(samples[i] for i in micro_batch) for micro_batch in own)

    def _forward_plan(self) -> list[list[int]]:
        """This rank's samples in micro-batches where no gradient is needed."""
        samples, size = self.samples, self._args.micro_batch_size
        if self._args.use_dynamic_batch_size:
            lengths = [computed_length(self.batch.tokens[i]) for i in samples]
            bins = pack(lengths, self._args.log_probs_max_tokens_per_gpu)
            return [[samples[i] for i in indices] for indices in bins]
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def _micro_batch(self, indices: Sequence[int], values: dict[str, Flat]) -> MicroBatch:
        align = self._args.tensor_model_parallel_size if self._args.sequence_parallel else 1
        return build_micro_batch(self.batch, self.trainable, indices, values, align=align, device=device())
