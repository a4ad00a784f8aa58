"""Runs micro-batches through the model with Megatron-core's schedule: to train, or only for log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rltrain.arguments.config import Config
from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.device import device, megatron_scope, model_scope
from rltrain.megatron.model.context_parallel import gather_values
from rltrain.megatron.model.layers.mtp import head_logits, head_of, lent_embedding, noted_output
from rltrain.megatron.routing_replay import replay
from rltrain.megatron.training.log_probs import log_probs_and_entropy
from rltrain.megatron.training.loss import Sums, add_up, micro_batch_loss
from rltrain.megatron.training.micro_batch import MicroBatch

LossFunc = Callable[..., Any]


@torch.no_grad()
def forward_only(
    models: list[DistributedDataParallel],
    micro_batches: list[MicroBatch],
    read: Callable[[MicroBatch, Tensor], Tensor],
    columns: tuple[int, ...] = (),
) -> list[Tensor]:
    """What `read` makes of each micro-batch's outputs, [n, *columns], without gradients, on every rank.

    Args:
        models: This rank's chunks of the model.
        read: From the outputs for this rank's trainable tokens to values for each of all; see `gather_own`.
        columns: Shape of a token's values; () for a single one.
    """

    def collect(micro_batch: MicroBatch, outputs: Tensor, non_loss_data: bool) -> Tensor:
        return read(micro_batch, outputs)

    return _from_last_stage(_run(models, micro_batches, collect, forward_only=True), micro_batches, columns)


def forward_log_probs(
    models: list[DistributedDataParallel],
    micro_batches: list[MicroBatch],
    shape: ModelShape,
    config: Config,
) -> list[Tensor]:
    """log π of the trainable tokens of each micro-batch, [n] each, without gradients."""
    return forward_only(
        models, micro_batches, lambda each, logits: _statistics(each, logits, shape, config)[0]
    )


def forward_log_probs_and_entropy(
    models: list[DistributedDataParallel],
    micro_batches: list[MicroBatch],
    shape: ModelShape,
    config: Config,
) -> list[Tensor]:
    """The same with the entropy, [n, 2] each."""

    def read(micro_batch: MicroBatch, logits: Tensor) -> Tensor:
        return torch.stack(_statistics(micro_batch, logits, shape, config), dim=1)

    return forward_only(models, micro_batches, read, columns=(2,))


def forward_backward(
    models: list[DistributedDataParallel],
    micro_batches: list[MicroBatch],
    loss: Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]],
) -> Sums:
    """Accumulate the gradient of Σ weight·loss over all ranks' tokens, and reduce it over the ranks.

    Megatron-core divides a loss by the number of micro-batches, and its data parallel reduction takes the mean
    over ranks. The token weights already hold the whole normalisation, so both are undone here. (It also takes
    the mean over context parallel ranks, and multiplies the loss with their number, which is right for us.)

    Args:
        models: This rank's chunks of the model.
        loss: The share of this data parallel rank in the step's loss from a micro-batch and the model's outputs
            for this rank's trainable tokens, and the sums for the metrics. See `gather_own`.

    Returns:
        This rank's sums for the metrics: the same on all context parallel ranks, none but on the last
        pipeline stage.
    """
    undo = len(micro_batches) * parallel_state.get_data_parallel_world_size()

    def loss_func(
        micro_batch: MicroBatch, outputs: Tensor, of_head: tuple[Tensor, float] | None = None
    ) -> tuple[Tensor, Sums]:
        value, sums = loss(micro_batch, outputs)
        if of_head is not None:
            further, scale = of_head
            value, sums = value + scale * further, sums | {"mtp_loss": further.detach()}
        return value * undo, sums

    with lent_embedding([each.module for each in models]):
        return add_up(_run(models, micro_batches, loss_func, forward_only=False))


def _loss_of_head(model: GPTModel, output: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, float]:
    """The cross-entropy of the tokens that the model's head predicts, with their weights; and its scale.

    Args:
        output: Of the model's layers, see `noted_output`.
    """
    further, head = micro_batch.further, head_of(model)
    assert further is not None and head is not None
    logits = head_logits(model, output, further.places, further.tokens, further.sequences, further.rows)
    log_probs, _ = log_probs_and_entropy(
        logits,
        further.targets,
        vocab_size=head.vocab_size,
        group=parallel_state.get_tensor_model_parallel_group(),
        chunk_size=head.chunk_size,
    )
    return -log_probs @ further.weights, head.scale


def token_loss(
    shape: ModelShape,
    config: Config,
    note: Callable[[MicroBatch, Tensor, Tensor], object] = lambda *seen: None,
) -> Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]]:
    """The loss of a model's logits that `args.loss_type` names, for `forward_backward`.

    Args:
        note: Given every micro-batch with the log-probs and the entropies of its tokens.
    """

    def loss(micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Sums]:
        log_probs, entropy = _statistics(micro_batch, logits, shape, config)
        note(micro_batch, log_probs, entropy)
        return micro_batch_loss(config, log_probs, entropy, micro_batch.inputs, micro_batch.responses)

    return loss


def _statistics(
    micro_batch: MicroBatch, logits: Tensor, shape: ModelShape, config: Config
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the n trainable tokens from this rank's logits, [1, own n, vocabulary / ranks]."""
    own = log_probs_and_entropy(
        logits.squeeze(0),
        micro_batch.targets,
        temperature=1.0 if config.algorithm.loss_type == "sft_loss" else config.rollout.rollout_temperature,
        vocab_size=shape.vocab_size,
        group=parallel_state.get_tensor_model_parallel_group(),
        chunk_size=config.training.log_probs_chunk_size,
    )
    log_probs, entropy = gather_own(micro_batch, *own)
    return log_probs, entropy


def gather_own(micro_batch: MicroBatch, *own: Tensor) -> tuple[Tensor, ...]:
    """Values of all n trainable tokens from those of this rank, [own n] each.

    Every context parallel rank then computes the same loss, and has the gradients of its own tokens.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return own
    return gather_values(own, micro_batch.own, micro_batch.num_trainable, group)


def _from_last_stage(
    results: list[Tensor], micro_batches: list[MicroBatch], columns: tuple[int, ...]
) -> list[Tensor]:
    """The last pipeline stage's results, [n, *columns] each, on all stages."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return results
    sizes = [micro_batch.num_trainable for micro_batch in micro_batches]
    values = torch.cat(results) if results else torch.empty(sum(sizes), *columns, device=device())
    dist.broadcast(values, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return list(values.split(sizes))


def _run(
    models: list[DistributedDataParallel],
    micro_batches: list[MicroBatch],
    loss_func: LossFunc,
    *,
    forward_only: bool,
) -> list[Any]:
    """What `loss_func` returned for each micro-batch; nothing but on the last pipeline stage."""

    def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, LossFunc]:
        micro_batch = next(batches)
        replay(model.module, micro_batch.routes, trains=not forward_only)
        positions = micro_batch.sequences.positions
        with (
            model_scope(model.module.config),
            _only_rows(model.module, micro_batch.rows),
            _at_positions(model.module, positions),
            noted_output(model.module) as noted,
        ):
            output = model(
                input_ids=micro_batch.tokens,
                position_ids=None,
                attention_mask=None,
                packed_seq_params=micro_batch.sequences,
                padding_mask=_unrouted(model.module, micro_batch.padding),
            )
        if forward_only or head_of(model.module) is None:
            return output, partial(loss_func, micro_batch)
        with model_scope(model.module.config):
            of_head = _loss_of_head(model.module, noted[0], micro_batch)
        return output, partial(loss_func, micro_batch, of_head=of_head)

    with megatron_scope():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in models],
            model=models,
            num_microbatches=len(micro_batches),
            # What pipeline stages exchange, where all micro-batches have one length.
            seq_length=sum(micro_batches[0].sequences.lengths),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def _unrouted(model: GPTModel, padding: Tensor) -> Tensor | None:
    """The tokens that must not count where experts are balanced, or None where they are not."""
    config = model.config
    if not config.num_moe_experts or not (config.moe_aux_loss_coeff or config.moe_z_loss_coeff):
        return None
    if config.sequence_parallel and not model.pre_process:
        # Megatron-core takes this rank's share on the first pipeline stage only.
        group = parallel_state.get_tensor_model_parallel_group()
        return padding.chunk(group.size(), dim=1)[group.rank()]
    return padding


@contextmanager
def _at_positions(model: GPTModel, positions: Tensor | None) -> Iterator[None]:
    """While entered, rotary embeddings are those of these positions, [t], where they don't follow from the lengths."""
    if positions is None or model.config.multi_latent_attention:  # its layers look them up themselves
        yield
        return
    hook = model.rotary_pos_emb.register_forward_hook(lambda *call: call[-1].index_select(0, positions))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _only_rows(model: GPTModel, rows: Tensor) -> Iterator[None]:
    """While entered, the last stage computes logits only at these positions: prompts need none.

    With sequence parallelism the output layer itself gathers the positions from the ranks, so there the rows
    are taken from its result.
    """

    def before(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].index_select(0, rows), *inputs[1:])

    def after(layer: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> Any:
        return output[0].index_select(0, rows), output[1]

    if not model.post_process:
        yield
        return
    layer = model.output_layer
    gathers = model.config.sequence_parallel
    hook = layer.register_forward_hook(after) if gathers else layer.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
