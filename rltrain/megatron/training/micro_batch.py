"""One packed micro-batch as tensors: what goes into the model, and what its loss is given of each token.

The loss is flat over trainable tokens: the model computes logits at `rows` and nowhere else. Users' loss functions,
which have slime's signature, are given whole responses (`Responses`).

The inputs of the loss are complete before the first optimizer step of a rollout. They come from the batch
(`RankShare.loss_inputs`), other policies (`OtherPolicies.add_log_probs`), the critic, and the advantages that are
made of all of them (`advantages.with_advantages`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rltrain.data.batch import Flat, TrainableTokens, TrainBatch, joined
from rltrain.data.further import Further, further_tokens
from rltrain.data.prefixes import Layout, Prefixes, lay_out
from rltrain.megatron.model.attention import PackedSequences
from rltrain.megatron.model.context_parallel import chunk_multiple, own_positions
from rltrain.megatron.routing_replay import Routes, packed_routes

Values = TypeVar("Values")
Others = TypeVar("Others")
_PADDING_LENGTH = 128


@dataclass(frozen=True)
class LossInputs(Generic[Values]):
    """Values of the trainable tokens, one of each kind per token; None: no flag asks for them.

    `LossInputs[Flat]` holds a whole rollout: a list of float32 arrays [trainable tokens], one per sample. Values that
    ranks compute are empty for the samples of other ranks. `LossInputs[Tensor]` holds a micro-batch: float32 tensors
    [n] over its n trainable tokens, in the order in which they are packed, on this rank's device.

    Attributes:
        weights: The token's weight in the loss of its optimizer step; the weights hold the whole normalisation.
        rollout_log_probs: log π of the engine that sampled the token.
        compared_log_probs: The same where the trainer must compute equal ones; NaN at tokens of older weights.
        normalizer: 1 / rollouts (or tokens) of the token's optimizer step, for losses that users' functions reduce.
        ref_log_probs: log π of the reference.
        teacher_log_probs: log π of the teacher of on-policy distillation.
        old_log_probs: log π of the policy before the first optimizer step, the engine's with --use-rollout-logprobs,
            or of the policy that --keep-old-actor keeps; None if the training pass computes them itself.
        entropy: Entropy of the distributions behind `old_log_probs`, with --use-rollout-entropy.
        ref_entropy: The same of the reference.
        old_values: The critic's values before the first optimizer step.
        returns: What the critic learns to predict.
        opd_reverse_kl: log π of the policy minus the teacher's.
        advantages: Of the token, in the policy's loss.
    """

    weights: Values
    rollout_log_probs: Values | None = None
    compared_log_probs: Values | None = None
    normalizer: Values | None = None
    ref_log_probs: Values | None = None
    teacher_log_probs: Values | None = None
    old_log_probs: Values | None = None
    entropy: Values | None = None
    ref_entropy: Values | None = None
    old_values: Values | None = None
    returns: Values | None = None
    opd_reverse_kl: Values | None = None
    advantages: Values | None = None

    def given(self) -> dict[str, Values]:
        """Those that are not None, by name."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: values for name, values in named.items() if values is not None}

    def map(self, function: Callable[[Values], Others]) -> LossInputs[Others]:
        """The same kinds, each as `function` makes it of what there is."""
        return LossInputs(**{name: function(values) for name, values in self.given().items()})


@dataclass(frozen=True)
class Responses:
    """The responses of one micro-batch, in the order in which its tokens are packed."""

    total_lengths: list[int]
    response_lengths: list[int]
    loss_masks: list[Tensor]  # [response length] float32 of 0 and 1

    @classmethod
    def of(cls, batch: TrainBatch, indices: Sequence[int], device: torch.device) -> Responses:
        """Those of some samples of a rollout.

        Without samples it is one response of one token that is not trained on, so that no custom function
        has to expect an empty list.
        """
        if not indices:
            return cls([1], [1], [torch.zeros(1, device=device)])
        masks = torch.from_numpy(joined([batch.loss_masks[i] for i in indices], np.float32))
        return cls(
            total_lengths=[len(batch.tokens[i]) for i in indices],
            response_lengths=[batch.response_lengths[i] for i in indices],
            loss_masks=list(masks.to(device).split([batch.response_lengths[i] for i in indices])),
        )

    def counts(self, device: torch.device) -> Tensor:
        """Trainable tokens of each response, [responses] int64."""
        return torch.tensor([int(mask.sum()) for mask in self.loss_masks], dtype=torch.int64, device=device)

    def expand(self, flat: Tensor) -> Tensor:
        """Values of the n trainable tokens as values of all response tokens: 0 for the others. Keeps gradients."""
        full = flat.new_zeros(sum(self.response_lengths))
        return full.index_put((self._positions(flat.device),), flat)

    def collapse(self, full: Tensor) -> Tensor:
        """The inverse of `expand`."""
        return full.index_select(0, self._positions(full.device))

    def split(self, full: Tensor) -> list[Tensor]:
        """Values of all response tokens, one tensor a response."""
        return list(full.split(self.response_lengths))

    def _positions(self, device: torch.device) -> Tensor:
        return torch.cat(self.loss_masks).nonzero().squeeze(1).to(device)


@dataclass(frozen=True)
class FurtherTokens:
    """Inputs of the MTP head, on this rank's device: m tokens, k of which predict a target.

    Every tensor parallel rank has all of them; padding makes m a number that the ranks can share out.
    """

    sequences: PackedSequences
    places: Tensor  # [m] int64: where they are among the micro-batch's t
    tokens: Tensor  # [m] int64: the token after each
    rows: Tensor  # [k] int64: which of the m predict `targets`
    targets: Tensor  # [k] int64
    weights: Tensor  # [k] float32: of the targets in the loss

    @classmethod
    def of(cls, further: Further, split: TokenSplit, device: torch.device) -> FurtherTokens:
        """With padding, which nothing is predicted from."""
        end = len(further.tokens)
        padding = replace(split, min_tokens=0).padded_total(end) - end
        lengths = [*further.lengths, *_padding(padding, 1)]

        def tensor(array: NDArray[np.generic], pad: int = 0) -> Tensor:
            return torch.from_numpy(np.pad(array, (0, pad))).to(device, non_blocking=True)

        return cls(
            PackedSequences.from_lengths(lengths, device),
            tensor(further.places, padding),
            tensor(further.tokens, padding),
            tensor(further.rows),
            tensor(further.targets),
            tensor(further.weights),
        )


@dataclass(frozen=True)
class MicroBatch:
    """Tensors on this rank's device. t tokens in all, n of them trainable.

    Context parallel ranks share both out: a rank has t / ranks tokens and `rows` and `targets` for those of the n
    that are among its tokens. Inputs of the loss are over all n on every rank.
    """

    indices: tuple[int, ...]  # samples, in the order in which they are packed
    tokens: Tensor  # [1, own t] int64
    padding: Tensor  # [1, own t] bool: tokens of no sample
    sequences: PackedSequences
    rows: Tensor  # [own n] int64: positions in `tokens` whose logits predict `targets`
    targets: Tensor  # [own n] int64
    own: Tensor  # [own n] int64: which of the n they are
    num_trainable: int  # n
    inputs: LossInputs[Tensor]
    responses: Responses
    last_tokens: Tensor  # [samples] int64: the last token of each, which is only a target
    places: list[NDArray[np.int64]]  # of each sample: where its tokens but the last are among all t
    routes: Tensor | None = (
        None  # [own t, layers, experts a token] int16: the experts to take; -1: the router's own
    )
    further: FurtherTokens | None = None  # where the model's head for one token more is trained

    def with_all_rows(self) -> MicroBatch:
        """The same, with logits of every token."""
        return replace(self, rows=torch.arange(self.tokens.shape[1], device=self.tokens.device))


@dataclass(frozen=True)
class TokenSplit:
    """How the tokens of a micro-batch are shared out over ranks.

    Attributes:
        sequence_size: Ranks that share this rank's tokens by sequence parallelism.
        min_tokens: Micro-batches are padded to at least this many tokens (of all ranks).
    """

    sequence_size: int = 1
    context_size: int = 1
    context_rank: int = 0
    min_tokens: int = 0

    def padded(self, length: int) -> int:
        """Tokens that a sequence takes up."""
        return _round_up(length, chunk_multiple(self.context_size))

    def padded_total(self, tokens: int) -> int:
        """Tokens that a micro-batch takes up."""
        multiple = self.sequence_size * chunk_multiple(self.context_size)
        return _round_up(max(tokens, self.min_tokens, 1), multiple)


def computed_length(tokens: NDArray[np.int32]) -> int:
    """Tokens of a sequence that go through the model: all but the last, whose logits are not needed."""
    return len(tokens) - 1


def build_micro_batch(
    batch: TrainBatch,
    trainable: TrainableTokens,
    indices: Sequence[int],
    inputs: LossInputs[Flat],
    *,
    split: TokenSplit,
    device: torch.device,
    routes: Routes | None = None,
    prefixes: Prefixes | None = None,
    with_further: bool = False,
) -> MicroBatch:
    """Pack samples one after the other, sorted by length: attention joins sequences of equal length.

    Args:
        indices: Samples of the micro-batch; none gives a micro-batch of padding without trainable tokens.
        inputs: Of the whole rollout.
        routes: Of the whole rollout, where its tokens' experts are given; then samples share nothing.
        prefixes: Of the samples' computed tokens. What samples have in common is there once; without them nothing is.
        with_further: Whether a head for one token more is trained with it.
    """
    prefixes = prefixes or Prefixes.none(len(batch))
    layout = lay_out(indices, {i: split.padded(computed_length(batch.tokens[i])) for i in indices}, prefixes)
    order = layout.order
    places = [each[: computed_length(batch.tokens[i])] for i, each in zip(order, layout.places, strict=True)]
    total = split.padded_total(layout.total)
    lengths, sequences = _packed(layout, total, split, device)
    tokens = np.zeros(total, np.int64)
    padding = np.ones(total, bool)
    place_of = joined(places, np.int64)  # of each computed token, one sample's after the other's
    tokens[place_of] = joined([batch.tokens[i][:-1] for i in order], np.int64)
    padding[place_of] = False
    at = _trainable(trainable, order, places)
    rows = place_of[at]
    targets = joined([batch.tokens[i][1:] for i in order], np.int64)[at]
    own_tokens = own_positions(lengths, split.context_size, split.context_rank)
    place = _place_among(own_tokens, total)
    own = np.flatnonzero(place[rows] >= 0)

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    of_samples = batch.tokens, trainable.positions, inputs.weights
    further = _further(of_samples, order, places, split, device) if with_further else None
    return MicroBatch(
        indices=order,
        tokens=tensor(tokens[own_tokens]).unsqueeze(0),
        padding=tensor(padding[own_tokens]).unsqueeze(0),
        sequences=sequences,
        rows=tensor(place[rows][own]),
        targets=tensor(targets[own]),
        own=tensor(own),
        num_trainable=len(rows),
        inputs=inputs.map(lambda flat: tensor(joined([flat[i] for i in order], np.float32))),
        responses=Responses.of(batch, order, device),
        last_tokens=tensor(joined([batch.tokens[i][-1:] for i in order], np.int64)),
        routes=None if routes is None else packed_routes(routes, order, _starts(places), own_tokens, total),
        places=places,
        further=further,
    )


def _packed(
    layout: Layout, total: int, split: TokenSplit, device: torch.device
) -> tuple[list[int], PackedSequences]:
    """The sequences with those of padding behind them, up to `total` tokens: their lengths, and what attention sees."""
    lengths, keys, families, end = [*layout.lengths], [*layout.keys], [*layout.families], layout.total
    for length in _padding(total - end, chunk_multiple(split.context_size)):
        lengths.append(length)
        keys.append(np.arange(end, end + length))
        families.append(1)
        end += length
    if any(len(seen) > length for seen, length in zip(keys, lengths, strict=True)):
        return lengths, PackedSequences.sharing(lengths, keys, families, device)
    return lengths, PackedSequences.from_lengths(lengths, device, split.context_size, split.context_rank)


def _further(
    of_samples: tuple[Sequence[Any], Sequence[Any], Sequence[Any]],
    order: Sequence[int],
    places: Sequence[NDArray[np.int64]],
    split: TokenSplit,
    device: torch.device,
) -> FurtherTokens:
    """Of all samples' tokens, trainable positions and weights."""
    tokens, positions, weights = ([each[i] for i in order] for each in of_samples)
    return FurtherTokens.of(further_tokens(tokens, places, positions, weights), split, device)


def _place_among(kept: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Where each of `total` tokens is among the `kept` ones; -1 for the others."""
    place = np.full(total, -1)
    place[kept] = np.arange(len(kept))
    return place


def _starts(places: Sequence[NDArray[np.int64]]) -> list[int]:
    return [int(each[0]) for each in places]


def _trainable(
    trainable: TrainableTokens, order: Sequence[int], places: Sequence[NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Which computed tokens predict trainable ones, where those of samples follow each other in this order."""
    counts = np.array([trainable.count(i) for i in order], np.int64)
    starts = np.cumsum([0, *map(len, places)])[:-1]
    positions: NDArray[np.int64] = joined([trainable.positions[i] for i in order], np.int64)
    return positions + np.repeat(starts, counts)


def _padding(tokens: int, multiple: int) -> list[int]:
    """Lengths of sequences of padding: short ones, because attention to them costs too."""
    piece = _round_up(_PADDING_LENGTH, multiple)
    return [piece] * (tokens // piece) + ([tokens % piece] if tokens % piece else [])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
