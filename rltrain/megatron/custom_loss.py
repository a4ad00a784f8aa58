"""--loss-type custom_loss: a function of the user, with slime's signature, in place of the loss.

It is called as `function(args, batch, logits, sum_of_sample_mean)` and returns a scalar and a dict of scalars.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from rltrain.arguments.config import Config
from rltrain.arguments.hf_config import ModelShape
from rltrain.functions import load_function
from rltrain.megatron.model.context_parallel import gather_outputs
from rltrain.megatron.training.log_probs import log_probs_and_entropy
from rltrain.megatron.training.loss import Sums
from rltrain.megatron.training.micro_batch import MicroBatch, Responses

# Our names of inputs of the loss, and slime's.
_SLIMES_NAMES = {
    "weights": "weights", "advantages": "advantages", "returns": "returns",
    "old_log_probs": "log_probs", "old_values": "values",
    "ref_log_probs": "ref_log_probs", "rollout_log_probs": "rollout_log_probs",
    "teacher_log_probs": "teacher_log_probs", "opd_reverse_kl": "opd_reverse_kl",
}  # fmt: skip


def custom_loss(shape: ModelShape, config: Config) -> Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]]:
    """The user's loss of the logits of every token, for `forward_backward`.

    Raises (when called):
        ValueError: the function returned something else than a scalar and a dict of scalars.
    """
    path = config.functions.custom_loss_function_path
    function = load_function(path, flag="--custom-loss-function-path")

    def loss(micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Sums]:
        batch, all_logits = slime_batch(micro_batch, logits, shape)
        # An empty micro-batch has a response of padding, so that every rank has the same metrics.
        assert micro_batch.inputs.normalizer is not None
        normalizer = micro_batch.inputs.normalizer[0] if micro_batch.indices else logits.new_zeros(())
        weights = torch.cat(batch["weights"]) / normalizer.clamp_min(torch.finfo(torch.float32).tiny)
        value, metrics = _checked(
            path, function(config.namespace, batch, all_logits, sum_of_sample_mean(weights))
        )
        sums = {name: torch.as_tensor(each, device=logits.device).detach().float() * normalizer
                for name, each in {"loss": value, **metrics}.items()}  # fmt: skip
        return value * normalizer + 0.0 * logits.sum(), sums

    return loss


def slime_batch(micro_batch: MicroBatch, logits: Tensor, shape: ModelShape) -> tuple[dict[str, Any], Tensor]:
    """A micro-batch and its logits as slime lays them out.

    Args:
        logits: [1, own t, vocabulary / ranks], of all of this rank's tokens; context parallel ranks bring theirs
            together.

    Returns:
        Lists with one tensor a response, and fp32 logits [1, Σ total_lengths, vocabulary / ranks], zeros for the
        last token of each sequence.
    """
    responses, empty = micro_batch.responses, not micro_batch.indices
    if empty:
        zero = torch.zeros(1, device=logits.device)
        responses = Responses([2], [1], [zero])
    lengths = responses.total_lengths
    ends = torch.tensor(lengths, device=logits.device).cumsum(0)
    computed = torch.ones(int(ends[-1]), dtype=torch.bool, device=logits.device)
    computed[ends - 1] = False
    positions = computed.nonzero().squeeze(1)
    kept = torch.from_numpy(_places(micro_batch)).to(logits.device)
    given = _whole(logits[0], micro_batch).index_select(0, kept).float()
    all_logits = given.new_zeros(len(computed), given.shape[-1]).index_copy_(0, positions, given)
    batch: dict[str, Any] = {
        "unconcat_tokens": _tokens(micro_batch, kept, lengths),
        "total_lengths": lengths,
        "response_lengths": responses.response_lengths,
        "loss_masks": responses.loss_masks,
        "vocab_size": shape.vocab_size,
    }
    for name, flat in micro_batch.inputs.given().items():
        if name in _SLIMES_NAMES:
            full = torch.zeros(1, device=logits.device) if empty else responses.expand(flat)
            batch[_SLIMES_NAMES[name]] = responses.split(full)
    return batch, all_logits.unsqueeze(0)


def response_log_probs(
    args: argparse.Namespace, batch: dict[str, Any], logits: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """log π and the entropy of every response token, one tensor a response, for custom losses to build on.

    They carry gradients, and know of tensor parallelism and of --rollout-temperature.
    """
    log_probs, entropies, end = [], [], 0
    for tokens, total, length in zip(
        batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True
    ):
        end += total
        found = log_probs_and_entropy(
            logits[0, end - length - 1 : end - 1],
            tokens[-length:],
            temperature=args.rollout_temperature,
            vocab_size=batch["vocab_size"],
            group=parallel_state.get_tensor_model_parallel_group(),
            chunk_size=args.log_probs_chunk_size,
        )
        log_probs.append(found[0])
        entropies.append(found[1])
    return log_probs, entropies


def sum_of_sample_mean(weights: Tensor) -> Callable[[Tensor], Tensor]:
    """Σ over samples of the mean over their trained tokens; with --calculate-per-token-loss over all tokens.

    Args:
        weights: Of every response token, one response after the other.

    Returns:
        A function of values in the same order.
    """
    return lambda values: values @ weights.to(values.dtype)


def _whole(own: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Something of all tokens, [t, …], gathered from the tokens of the context parallel ranks, [own t, …]."""
    order = micro_batch.sequences.order
    if order is None:
        return own
    return gather_outputs(own, order, parallel_state.get_context_parallel_group())


def _places(micro_batch: MicroBatch) -> NDArray[np.int64]:
    """Where the tokens of all samples are, each without its last; of padding the first, if there is no sample."""
    return np.concatenate(micro_batch.places) if micro_batch.places else np.zeros(1, np.int64)


def _tokens(micro_batch: MicroBatch, kept: Tensor, lengths: list[int]) -> list[Tensor]:
    """Prompt and response of each sample; the last token of a sequence is only a target."""
    tokens = _whole(micro_batch.tokens[0], micro_batch).index_select(0, kept)
    if not micro_batch.indices:
        return [tokens.new_zeros(2)]
    packed = tokens.split([length - 1 for length in lengths])
    last = micro_batch.last_tokens
    return [torch.cat([each, last[i : i + 1]]) for i, each in enumerate(packed)]


def _checked(path: str | None, result: Any) -> tuple[Tensor, dict[str, Any]]:
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise ValueError(f"{path} returned {result!r:.200}; expected (loss, metrics)")
    value, metrics = result
    for name, each in {"loss": value, **metrics}.items():
        if each.ndim if isinstance(each, Tensor) else not isinstance(each, int | float):
            what = f"of shape {tuple(each.shape)}" if isinstance(each, Tensor) else repr(each)
            raise ValueError(f"{path}: {name} is {what:.200}; expected a scalar")
    return value, metrics
