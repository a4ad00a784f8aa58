"""A rollout as one rank trains on it: its samples, in optimizer steps and micro-batches."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from rltrain.algorithms.reduce import token_weights
from rltrain.arguments.hf_config import ModelShape
from rltrain.data.batch import TrainBatch
from rltrain.data.packing import Bin, StepPlan, pack_ranks, plan_step
from rltrain.data.trainable import Flat, TrainableTokens
from rltrain.megatron.device import device
from rltrain.megatron.flops import sequence_flops
from rltrain.megatron.micro_batch import MicroBatch, TokenSplit, build_micro_batch, computed_length
from rltrain.megatron.model import uniform_micro_batches


class RankShare:
    """Every rank is given the whole batch and computes the same plan; this is its own part of it.

    Attributes:
        batch: All samples of the rollout.
        trainable: Where their trainable tokens are.
        num_steps: Optimizer steps.
        samples: This rank's samples. Those that nothing is trained on are nobody's.
    """

    def __init__(self, args: argparse.Namespace, shape: ModelShape, batch: TrainBatch) -> None:
        """Share a rollout out over the data parallel ranks."""
        self._args, self._shape, self.batch = args, shape, batch
        self.trainable = TrainableTokens.of(batch)
        self._split = TokenSplit(
            sequence_size=args.tensor_model_parallel_size if args.sequence_parallel else 1,
            context_size=args.context_parallel_size,
            context_rank=parallel_state.get_context_parallel_rank(),
        )
        virtual = args.num_virtual_stages_per_pipeline_rank or args.num_layers_per_virtual_pipeline_stage
        self._multiple = args.pipeline_model_parallel_size if virtual else 1
        self._steps = batch.steps(args.num_steps_per_rollout)
        self.num_steps = len(self._steps)
        self._all_plans = [self._plan(step) for step in self._steps]
        rank = parallel_state.get_data_parallel_rank()
        self.samples = [i for plan in self._all_plans for micro_batch in plan[rank] for i in micro_batch]

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
        if self._args.custom_pg_loss_reducer_function_path or self._args.loss_type == "custom_loss":
            counts = [
                sum(trainable.count(i) for i in step) if per_token else len(set(batch.rollouts(step)))
                for step in self._steps
            ]
            shares = [np.full(len(step), 1 / max(1, n)) for step, n in zip(self._steps, counts, strict=True)]
            values["normalizer"] = trainable.spread(self._per_sample(shares))
        return values

    def micro_batches(self, step: int, values: dict[str, Flat]) -> list[MicroBatch]:
        """The micro-batches of an optimizer step, with these values of their tokens."""
        micro_batches = self._micro_batches(self._all_plans[step], values)
        if self._args.loss_type == "custom_loss":  # it is given the logits of every token
            return [each.with_all_rows() for each in micro_batches]
        return micro_batches

    def per_token(self, forward: Callable[[list[MicroBatch]], list[Tensor]]) -> Flat:
        """What `forward` returns for the trainable tokens of this rank; other samples' entries are empty.

        Args:
            forward: From micro-batches, packed as there is room without gradients, to their [n] values each.
        """
        micro_batches = self._micro_batches(self._forward_plan(), {})
        return self.scatter(micro_batches, forward(micro_batches))

    def scatter(self, micro_batches: Sequence[MicroBatch], values: Sequence[Tensor]) -> Flat:
        """Values of micro-batches' trainable tokens, [n] each, by sample; other samples' entries are empty."""
        flat: Flat = [np.empty(0, np.float32)] * len(self.batch)
        for micro_batch, each in zip(micro_batches, values, strict=True):
            sizes = [self.trainable.count(i) for i in micro_batch.indices]
            for i, part in zip(micro_batch.indices, each.cpu().split(sizes), strict=True):
                flat[i] = part.numpy()
        return flat

    def _per_sample(self, of_steps: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """One value a sample, from the values of each step's samples."""
        values = np.zeros(len(self.batch))
        for step, part in zip(self._steps, of_steps, strict=True):
            values[step] = part
        return values

    def _plan(self, step: NDArray[np.int64]) -> list[list[Bin]]:
        """Every rank's micro-batches of one optimizer step."""
        samples = [int(i) for i in step if self.trainable.count(i)]
        lengths = [self._length(i) for i in samples]
        costs = [self._flops(i) for i in samples] if self._args.balance_by_flops else None
        plan = plan_step(
            lengths,
            parallel_state.get_data_parallel_world_size(),
            max_tokens=self._budget(self._args.max_tokens_per_gpu),
            micro_batch_size=self._args.micro_batch_size,
            multiple=self._multiple,
            costs=costs,
        )
        return _of_samples(plan, samples)

    def _forward_plan(self) -> list[list[Bin]]:
        """Every rank's samples in micro-batches where no gradient is needed, as many on every rank."""
        ranks = [
            [i for plan in self._all_plans for micro_batch in plan[rank] for i in micro_batch]
            for rank in range(parallel_state.get_data_parallel_world_size())
        ]
        samples = [i for rank in ranks for i in rank]
        place = {sample: i for i, sample in enumerate(samples)}
        plan = pack_ranks(
            [self._length(i) for i in samples],
            [[place[i] for i in rank] for rank in ranks],
            max_tokens=self._budget(self._args.log_probs_max_tokens_per_gpu),
            micro_batch_size=self._args.micro_batch_size,
            multiple=self._multiple,
        )
        return _of_samples(plan, samples)

    def _budget(self, tokens_per_rank: int) -> int | None:
        """Tokens of a micro-batch, which context parallel ranks share."""
        if not self._args.use_dynamic_batch_size:
            return None
        return tokens_per_rank * self._args.context_parallel_size

    def _length(self, sample: int) -> int:
        return self._split.padded(computed_length(self.batch.tokens[sample]))

    def _flops(self, sample: int) -> float:
        return sequence_flops(self._shape, self._length(sample), self.trainable.count(sample))

    def _micro_batches(self, plan: list[list[Bin]], values: dict[str, Flat]) -> list[MicroBatch]:
        split = self._split
        if uniform_micro_batches(self._args):
            most = max(sum(map(self._length, each)) for rank in plan for each in rank)
            split = replace(split, min_tokens=most)
        own = plan[parallel_state.get_data_parallel_rank()]
        return [
            build_micro_batch(self.batch, self.trainable, indices, values, split=split, device=device())
            for indices in own
        ]


def _of_samples(plan: StepPlan, samples: list[int]) -> list[list[Bin]]:
    """A plan over places in a list of samples as one over the samples."""
    return [[tuple(samples[i] for i in each) for each in rank] for rank in plan.micro_batches]
