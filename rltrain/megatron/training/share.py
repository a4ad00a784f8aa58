"""A rollout as one rank trains on it: how it gets there, and its samples, in optimizer steps and micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from rltrain.algorithms.reduce import token_weights
from rltrain.arguments.config import Config
from rltrain.arguments.groups.model import Model
from rltrain.arguments.groups.training import why_separate
from rltrain.arguments.hf_config import ModelShape
from rltrain.data.batch import Flat, TrainableTokens, TrainBatch, split_rows
from rltrain.data.packing import Bin, StepPlan, pack_ranks, plan_step
from rltrain.data.prefixes import Prefixes
from rltrain.megatron.device import device
from rltrain.megatron.model.build import uniform_micro_batches
from rltrain.megatron.model.specs import use_transformer_engine
from rltrain.megatron.ranks import control_group
from rltrain.megatron.routing_replay import Routes, by_layer
from rltrain.megatron.training.flops import sequence_flops
from rltrain.megatron.training.micro_batch import (
    LossInputs,
    MicroBatch,
    TokenSplit,
    build_micro_batch,
    computed_length,
)
from rltrain.models.lengths import check_sequences

# Of a rollout's tokens, with TransformerEngine: its attention takes less time a token than the one that shares.
_LEAST_SHARE = 0.25


def table_of_rank_0(table: pa.Table | None) -> pa.Table:
    """Rank 0's table on every rank: sent as Arrow's bytes, which the other ranks' arrays then lie in.

    Args:
        table: On rank 0; ignored on the others.
    """
    if dist.get_world_size() == 1:
        assert table is not None
        return table
    group = control_group()
    content = torch.from_numpy(_arrow_bytes(table)) if dist.get_rank() == 0 else None
    size = torch.tensor([0 if content is None else len(content)])
    dist.broadcast(size, src=0, group=group)
    if content is None:
        content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, src=0, group=group)
    return table if dist.get_rank() == 0 else pa.ipc.open_stream(pa.py_buffer(content.numpy())).read_all()


def _arrow_bytes(table: pa.Table) -> NDArray[np.uint8]:
    """The table as an Arrow stream."""
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    # A copy: torch takes no memory that may not be written to.
    return np.frombuffer(stream.getvalue(), np.uint8).copy()


class RankShare:
    """Every rank is given the whole batch and computes the same plan; this is its own part of it.

    Attributes:
        batch: All samples of the rollout.
        trainable: Where their trainable tokens are.
        num_steps: Optimizer steps.
        samples: This rank's samples. Samples without trainable tokens belong to no rank.
        weights: Of every trainable token in the loss of its optimizer step.
        routes: The experts that the policy's passes are to take, of the engine or of an earlier pass; None: its own.
        prefixes: What samples have in common at their beginnings, and is computed once in a micro-batch.
        has_adapters: Whether adapters are all that is trained.
    """

    def __init__(self, config: Config, shape: ModelShape, batch: TrainBatch) -> None:
        """Share a rollout out over the data parallel ranks.

        Raises:
            UserError: a sequence is longer than the model may be given, on every rank.
        """
        check_sequences(shape.limit, map(len, batch.tokens))
        self._config, self._shape, self.batch = config, shape, batch
        self.trainable = TrainableTokens.of(batch)
        self._split = TokenSplit(
            sequence_size=config.parallel.tensor_model_parallel_size
            if config.parallel.sequence_parallel
            else 1,
            context_size=config.parallel.context_parallel_size,
            context_rank=parallel_state.get_context_parallel_rank(),
        )
        virtual = (
            config.parallel.num_virtual_stages_per_pipeline_rank
            or config.parallel.num_layers_per_virtual_pipeline_stage
        )
        self._multiple = config.parallel.pipeline_model_parallel_size if virtual else 1
        self.prefixes = _prefixes(config, shape, batch)
        self._lengths = [self._split.padded(computed_length(tokens)) for tokens in batch.tokens]
        self.has_adapters = config.lora.lora_rank > 0
        self._steps = batch.steps(config.training.num_steps_per_rollout)
        self.num_steps = len(self._steps)
        self._all_plans = [self._plan(step) for step in self._steps]
        rank = parallel_state.get_data_parallel_rank()
        self.samples = [i for plan in self._all_plans for micro_batch in plan[rank] for i in micro_batch]
        self.weights = self._weights()
        self.routes: Routes | None = None
        if batch.routes is not None and config.algorithm.use_rollout_routing_replay and shape.experts:
            self.routes = by_layer(batch.routes, shape.num_layers, shape.experts.top_k)

    def loss_inputs(self) -> LossInputs[Flat]:
        """What the batch brings for the loss."""
        engine, compared = self.batch.rollout_log_probs, self.batch.comparable_log_probs
        is_reduced = (
            self._config.functions.custom_pg_loss_reducer_function_path
            or self._config.algorithm.loss_type == "custom_loss"
        )
        return LossInputs(
            weights=self.weights,
            rollout_log_probs=None if engine is None else self.trainable.select(engine),
            compared_log_probs=None if compared is None else self.trainable.select(compared),
            normalizer=self._normalizer() if is_reduced else None,
        )

    def _weights(self) -> Flat:
        batch = self.batch
        weights = [
            token_weights(
                [batch.loss_masks[i] for i in step],
                per_token=self._config.algorithm.calculate_per_token_loss,
                rollout_ids=batch.rollouts(step),
            )
            for step in self._steps
        ]
        return self.trainable.spread(self._per_sample(weights))

    def _normalizer(self) -> Flat:
        per_token, batch, trainable = (
            self._config.algorithm.calculate_per_token_loss,
            self.batch,
            self.trainable,
        )
        counts = [
            sum(trainable.count(i) for i in step) if per_token else len(set(batch.rollouts(step)))
            for step in self._steps
        ]
        parts = [np.full(len(step), 1 / max(1, n)) for step, n in zip(self._steps, counts, strict=True)]
        return trainable.spread(self._per_sample(parts))

    def micro_batches(self, step: int, inputs: LossInputs[Flat]) -> list[MicroBatch]:
        """The micro-batches of an optimizer step, with these inputs of the loss."""
        micro_batches = self._micro_batches(self._all_plans[step], inputs, self.routes, trains=True)
        if self._config.algorithm.loss_type == "custom_loss":  # it is given the logits of every token
            return [each.with_all_rows() for each in micro_batches]
        return micro_batches

    def per_token(
        self, forward: Callable[[list[MicroBatch]], list[Tensor]], routes: Routes | None = None
    ) -> Flat:
        """What `forward` returns for the trainable tokens of this rank; other samples' entries are empty.

        Args:
            forward: From micro-batches, packed as there is room without gradients, to their [n] values each.
            routes: The experts to take.
        """
        micro_batches = self._micro_batches(self._forward_plan(), LossInputs(self.weights), routes)
        return self.scatter(micro_batches, forward(micro_batches))

    def scatter(self, micro_batches: Sequence[MicroBatch], values: Sequence[Tensor]) -> Flat:
        """Values of micro-batches' trainable tokens, [n] each, by sample; other samples' entries are empty."""
        flat: Flat = [np.empty(0, np.float32)] * len(self.batch)
        for micro_batch, each in zip(micro_batches, values, strict=True):
            sizes = [self.trainable.count(i) for i in micro_batch.indices]
            for i, part in zip(micro_batch.indices, split_rows(each.cpu().numpy(), sizes), strict=True):
                flat[i] = part
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
        lengths = [self._lengths[i] for i in samples]
        costs = [self._flops(i) for i in samples] if self._config.training.balance_by_flops else None
        plan = plan_step(
            lengths,
            parallel_state.get_data_parallel_world_size(),
            max_tokens=self._budget(self._config.training.max_tokens_per_gpu),
            micro_batch_size=self._config.training.micro_batch_size,
            multiple=self._multiple,
            costs=costs,
            prefixes=self.prefixes.subset(samples),
            prefix_cost=float if costs is None else lambda tokens: sequence_flops(self._shape, tokens, 0),
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
            [self._lengths[i] for i in samples],
            [[place[i] for i in rank] for rank in ranks],
            max_tokens=self._budget(self._config.training.log_probs_max_tokens_per_gpu),
            micro_batch_size=self._config.training.micro_batch_size,
            multiple=self._multiple,
            prefixes=self.prefixes.subset(samples),
        )
        return _of_samples(plan, samples)

    def _budget(self, tokens_per_rank: int | None) -> int | None:
        """Tokens of a micro-batch, which context parallel ranks share."""
        if not self._config.training.use_dynamic_batch_size:
            return None
        assert tokens_per_rank is not None
        return tokens_per_rank * self._config.parallel.context_parallel_size

    def _computed(self, micro_batch: Bin) -> int:
        """Tokens of a micro-batch that go through the model."""
        return sum(self._lengths[i] for i in micro_batch) - self.prefixes.shared(micro_batch)

    def num_shared(self) -> int:
        """Tokens of all ranks that training did not compute again: they were there for another sample."""
        return sum(self.prefixes.shared(each) for plan in self._all_plans for rank in plan for each in rank)

    def flops(self) -> float:
        """Floating point operations of one forward pass over all ranks' samples, as they are trained on."""
        every = [each for plan in self._all_plans for rank in plan for each in rank]
        lengths = Counter(self._lengths[i] for each in every for i in each)
        logits = sum(self.trainable.count(i) for each in every for i in each)
        total = sum(count * sequence_flops(self._shape, tokens, 0) for tokens, count in lengths.items())
        total += sequence_flops(self._shape, 0, logits)
        shared = (common for each in every for _, common in self.prefixes.among(each) if common)
        return total - sum(sequence_flops(self._shape, common, 0) for common in shared)

    def _flops(self, sample: int) -> float:
        return sequence_flops(self._shape, self._lengths[sample], self.trainable.count(sample))

    def _micro_batches(
        self,
        plan: list[list[Bin]],
        inputs: LossInputs[Flat],
        routes: Routes | None,
        *,
        trains: bool = False,
    ) -> list[MicroBatch]:
        split = self._split
        if uniform_micro_batches(self._config.parallel, self._config.model):
            most = max(self._computed(each) for rank in plan for each in rank)
            split = replace(split, min_tokens=most)
        own = plan[parallel_state.get_data_parallel_rank()]
        return [
            build_micro_batch(
                self.batch,
                self.trainable,
                indices,
                inputs,
                split=split,
                device=device(),
                routes=routes,
                prefixes=self.prefixes,
                with_further=trains and self._shape.head is not None,
            )
            for indices in own
        ]


def kept_separate(config: Config, shape: ModelShape) -> str | None:
    """Why no sample shares its prompt with others, in words; None where they do."""
    if reason := why_separate(
        config.training, config.parallel, config.model, config.algorithm, config.functions
    ):
        return reason
    if shape.linear is not None:
        return "linear attention's state after a prompt can't be shared by several samples"
    return None


def _prefixes(config: Config, shape: ModelShape, batch: TrainBatch) -> Prefixes:
    """What this rollout's samples share; nothing where that is not exact, or would not be worth it."""
    if kept_separate(config, shape):
        return Prefixes.none(len(batch))
    prefixes = Prefixes.of([each[:-1] for each in batch.tokens])
    if config.training.share_prompts is None and use_transformer_engine():
        least = _LEAST_SHARE * sum(map(len, batch.tokens))
        if _wants_kernels(config.model) or prefixes.shared(range(len(batch))) < least:
            return Prefixes.none(len(batch))
    return prefixes


def _wants_kernels(model: Model) -> bool:
    """Whether flags ask for one of TransformerEngine's ways to compute attention, such as a deterministic one."""
    given = model.megatron.get("transformer", {})
    return bool(given.get("deterministic_mode") or given.get("attention_backend"))


def describe_sharing(config: Config, shape: ModelShape) -> str:
    """Whether prompts are shared, for the trainer's log."""
    reason = kept_separate(config, shape)
    if reason is None:
        once = "prompts: a prefix that samples of a micro-batch share is computed once"
        if use_transformer_engine() and config.training.share_prompts is None:
            if _wants_kernels(config.model):
                return "prompts: computed for every sample (flags ask for TransformerEngine's attention)"
            once += f", in rollouts where that is at least {_LEAST_SHARE:.0%} of all tokens"
        return once
    return f"prompts: computed for every sample ({reason})"


def _of_samples(plan: StepPlan, samples: list[int]) -> list[list[Bin]]:
    """A plan over places in a list of samples as one over the samples."""
    return [[tuple(samples[i] for i in each) for each in rank] for rank in plan.micro_batches]
