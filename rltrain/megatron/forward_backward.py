"""Runs micro-batches through the model with Megatron-core's schedule: to train, or only for log-probs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.device import megatron_scope, model_scope
from rltrain.megatron.log_probs import log_probs_and_entropy
from rltrain.megatron.loss import Sums, add_up, micro_batch_loss
from rltrain.megatron.micro_batch import MicroBatch

LossFunc = Callable[..., Any]


@torch.no_grad()
def forward_only(
    model: DistributedDataParallel,
    micro_batches: list[MicroBatch],
    read: Callable[[MicroBatch, Tensor], Tensor],
) -> list[Tensor]:
    """What `read` makes of each micro-batch's outputs for its n trainable tokens, without gradients."""

    def collect(micro_batch: MicroBatch, outputs: Tensor, non_loss_data: bool) -> Tensor:
        return read(micro_batch, outputs)

    return _run(model, micro_batches, collect, forward_only=True)


def forward_log_probs(
    model: DistributedDataParallel, micro_batches: list[MicroBatch], shape: ModelShape, temperature: float
) -> list[Tensor]:
    """log π of the trainable tokens of each micro-batch, [n] each, without gradients."""
    return forward_only(
        model, micro_batches, lambda each, logits: _statistics(each, logits, shape, temperature)[0]
    )


def forward_backward(
    model: DistributedDataParallel,
    micro_batches: list[MicroBatch],
    loss: Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]],
) -> Sums:
    """Accumulate the gradient of Σ weight·loss over all ranks' tokens, and reduce it over the ranks.

    Megatron-core divides a loss by the number of micro-batches, and its data parallel reduction takes the mean
    over ranks. The token weights already hold the whole normalisation, so both are undone here.

    Args:
        loss: This rank's share of the step's loss from a micro-batch and the model's outputs for its n
            trainable tokens, and the sums for the metrics.

    Returns:
        This rank's sums for the metrics.
    """
    undo = len(micro_batches) * parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def loss_func(micro_batch: MicroBatch, outputs: Tensor) -> tuple[Tensor, Sums]:
        value, sums = loss(micro_batch, outputs)
        return value * undo, sums

    return add_up(_run(model, micro_batches, loss_func, forward_only=False))


def policy_loss(
    shape: ModelShape, args: argparse.Namespace
) -> Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]]:
    """The loss of a model's logits that `args.loss_type` names, for `forward_backward`."""
    temperature = 1.0 if args.loss_type == "sft_loss" else args.rollout_temperature

    def loss(micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Sums]:
        log_probs, entropy = _statistics(micro_batch, logits, shape, temperature)
        return micro_batch_loss(args, log_probs, entropy, micro_batch.values, micro_batch.responses)

    return loss


def _statistics(
    micro_batch: MicroBatch, logits: Tensor, shape: ModelShape, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the n trainable tokens from their logits, [1, n, vocabulary / ranks]."""
    return log_probs_and_entropy(
        logits.squeeze(0),
        micro_batch.targets,
        temperature=temperature,
        vocab_size=shape.vocab_size,
        group=parallel_state.get_tensor_model_parallel_group(),
    )


def _run(
    model: DistributedDataParallel,
    micro_batches: list[MicroBatch],
    loss_func: LossFunc,
    *,
    forward_only: bool,
) -> list[Any]:
    def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, LossFunc]:
        micro_batch = next(batches)
        with model_scope(), _only_rows(model.module, micro_batch.rows):
            logits = model(
                input_ids=micro_batch.tokens,
                position_ids=None,
                attention_mask=None,
                packed_seq_params=micro_batch.sequences,
            )
        return logits, partial(loss_func, micro_batch)

    with megatron_scope():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=1,  # not used without pipeline parallelism
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


@contextmanager
def _only_rows(model: GPTModel, rows: Tensor) -> Iterator[None]:
    """While entered, the model computes logits only at these positions: prompts need none.

    With sequence parallelism the output layer itself gathers the positions from the ranks, so there the rows
    are taken from its result.
    """

    def before(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].index_select(0, rows), *inputs[1:])

    def after(layer: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> Any:
        return output[0].index_select(0, rows), output[1]

    layer = model.output_layer
    gathers = model.config.sequence_parallel
    hook = layer.register_forward_hook(after) if gathers else layer.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
