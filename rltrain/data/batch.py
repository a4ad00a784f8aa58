"""What the trainer trains on: the samples of one rollout as arrays, and which of their tokens are trainable.

Trainable are the response tokens whose loss mask is 1. Per-token values of the trainer are kept as one array a sample
over just these tokens, so that nothing behind this module knows about masks or prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rltrain.sample import age


@dataclass(frozen=True)
class TrainBatch:
    """One entry a sample, in the order of the rollout."""

    tokens: list[NDArray[np.int32]]  # [prompt + response]
    response_lengths: list[int]
    loss_masks: list[NDArray[np.int8]]  # [response]
    train_rewards: NDArray[np.float32]  # after group normalisation; NaN: none
    rollout_log_probs: list[NDArray[np.float32]] | None  # [response], the engine's
    rollout_ids: NDArray[np.int64] | None = None  # samples that share one were one rollout; None: none do
    stale: list[bool] | None = None  # which have tokens of older weights than are trained
    teacher_log_probs: list[NDArray[np.float32]] | None = (
        None  # [response], where the rollout asked a teacher
    )
    indices: NDArray[np.int64] | None = None  # of the samples in the run; None: not known
    # [tokens − 1, layers · experts a token]: the experts that the engine sent each token to; -1: not known
    routes: list[NDArray[np.int16]] | None = None

    def __post_init__(self) -> None:
        for i, (tokens, length, mask) in enumerate(
            zip(self.tokens, self.response_lengths, self.loss_masks, strict=True)
        ):
            if len(mask) != length:
                raise ValueError(f"sample {i}: {len(mask)} mask entries for {length} response tokens")
            if mask.any() and len(tokens) <= length:
                raise ValueError(f"sample {i}: no prompt, so its first token has no log-prob")
        for whose, given in (("", self.rollout_log_probs), ("teacher's ", self.teacher_log_probs)):
            for i, log_probs in enumerate(given or []):
                if len(log_probs) != self.response_lengths[i]:
                    raise ValueError(
                        f"sample {i}: {len(log_probs)} {whose}log-probs for {self.response_lengths[i]} response"
                        " tokens"
                    )

    def __len__(self) -> int:
        return len(self.tokens)

    def steps(self, count: int) -> list[NDArray[np.int64]]:
        """The samples of each of `count` optimizer steps, in order: as many rollouts in each, whole ones."""
        if self.rollout_ids is None:
            return np.array_split(np.arange(len(self)), count)
        _, first, rollout = np.unique(self.rollout_ids, return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))[
            rollout
        ]  # of each sample: how many rollouts began before its own
        parts = np.array_split(np.arange(len(first)), count)
        return [np.flatnonzero(np.isin(order, part)) for part in parts]

    def rollouts(self, samples: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The rollout that each of these samples is of."""
        chosen = np.asarray(samples, dtype=np.int64)
        return chosen if self.rollout_ids is None else self.rollout_ids[chosen]

    @property
    def comparable_log_probs(self) -> list[NDArray[np.float32]] | None:
        """The engine's log-probs where the trainer must come to the same ones; NaN for stale samples."""
        if self.rollout_log_probs is None or not self.stale:
            return self.rollout_log_probs
        return [
            np.full_like(log_probs, np.nan) if stale else log_probs
            for log_probs, stale in zip(self.rollout_log_probs, self.stale, strict=True)
        ]

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens of all samples."""
        return sum(len(tokens) for tokens in self.tokens)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> TrainBatch:
        """Samples from a table with the columns `rltrain.schema.TRAIN_COLUMNS`.

        Log-probs are kept only if every sample that is trained on has them.

        Raises:
            ValueError: a sample's lists have lengths that do not fit together.
        """
        rewards = table["train_reward"].to_numpy().astype(np.float32)
        response_lengths = table["response_length"].to_pylist()
        masks = _lists(table["loss_mask"], np.int8)
        log_probs = _lists(table["rollout_log_probs"], np.float32)
        none = pa.chunked_array([pa.nulls(len(table), pa.list_(pa.float32()))])
        has_teacher = "teacher_log_probs" in table.column_names
        teacher = _lists(table["teacher_log_probs"] if has_teacher else none, np.float32)
        indices = table["index"] if "index" in table.column_names else None
        return cls(
            tokens=_required(_lists(table["tokens"], np.int32), "tokens"),
            response_lengths=response_lengths,
            loss_masks=_required(masks, "loss_mask"),
            train_rewards=rewards,
            rollout_log_probs=_log_probs(log_probs, masks, response_lengths),
            rollout_ids=_rollout_ids(table),
            stale=[
                bool(age(step, versions or []))
                for step, versions in zip(
                    table["step"].to_pylist(), table["weight_versions"].to_pylist(), strict=True
                )
            ],
            teacher_log_probs=_log_probs(teacher, masks, response_lengths),
            indices=indices if indices is None else indices.to_numpy(),
            routes=_routes(table),
        )


def _routes(table: pa.Table) -> list[NDArray[np.int16]] | None:
    """None where no sample has routes; a sample without routes gets -1 for every token."""
    if "routed_experts" not in table.column_names:
        return None
    rows = [
        (max(0, len(tokens) - 1), np.frombuffer(stored, np.int16) if stored else None)
        for tokens, stored in zip(table["tokens"], table["routed_experts"].to_pylist(), strict=True)
    ]
    width = next((len(flat) // count for count, flat in rows if flat is not None), 1)
    return [
        np.full((count, width), -1, np.int16) if flat is None else flat.reshape(count, width)
        for count, flat in rows
    ]


def _rollout_ids(table: pa.Table) -> NDArray[np.int64] | None:
    """None where nothing says so: files of older versions have no such column."""
    if "rollout_id" not in table.column_names or table["rollout_id"].null_count:
        return None
    return table["rollout_id"].to_numpy().astype(np.int64)


def _lists(column: pa.ChunkedArray, dtype: Any) -> list[NDArray[Any] | None]:
    """The lists of a list column as arrays (null stays None), without a copy per element."""
    rows: list[NDArray[Any] | None] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        offsets = chunk.offsets.to_numpy()
        valid = chunk.is_valid().to_numpy(zero_copy_only=False)
        bounds = zip(offsets[:-1], offsets[1:], valid, strict=True)
        rows += [values[start:end] if ok else None for start, end, ok in bounds]
    return rows


def _required(rows: list[NDArray[Any] | None], name: str) -> list[NDArray[Any]]:
    missing = [i for i, row in enumerate(rows) if row is None]
    if missing:
        raise ValueError(f"column {name} is null for sample {missing[0]}")
    return [row for row in rows if row is not None]


def _log_probs(
    rows: list[NDArray[np.float32] | None], masks: list[NDArray[np.int8] | None], response_lengths: list[int]
) -> list[NDArray[np.float32]] | None:
    """The engine's log-probs; samples that nothing is trained on (failed ones) may lack them: zeros."""
    filled: list[NDArray[np.float32]] = []
    for row, mask, length in zip(rows, masks, response_lengths, strict=True):
        if row is None and mask is not None and mask.any():
            return None
        filled.append(np.zeros(length, np.float32) if row is None else row)
    return filled


Flat = list[NDArray[np.float32]]  # one array a sample, over its trainable tokens


@dataclass(frozen=True)
class TrainableTokens:
    """Where they are; one entry a sample.

    Attributes:
        masks: [response_length] bool.
        positions: [trainable tokens]: the position in the sequence whose logits predict the token.
    """

    masks: list[NDArray[np.bool_]]
    positions: list[NDArray[np.int64]]

    @classmethod
    def of(cls, batch: TrainBatch) -> TrainableTokens:
        """The trainable tokens of every sample of a rollout."""
        lengths = [len(mask) for mask in batch.loss_masks]
        starts = np.cumsum([0, *lengths])[:-1]
        mask = joined(batch.loss_masks, np.int8).astype(bool)
        found = np.flatnonzero(mask)
        sample = np.repeat(np.arange(len(batch)), lengths)[found]
        # The logits at position t predict token t + 1.
        first = np.array([len(tokens) for tokens in batch.tokens], np.int64) - lengths - 1
        counts = np.bincount(sample, minlength=len(batch))
        return cls(split_rows(mask, lengths), split_rows(found + (first - starts)[sample], counts))

    def count(self, sample: int) -> int:
        """Trainable tokens of a sample."""
        return len(self.positions[sample])

    def spread(self, values: Sequence[float] | NDArray[Any]) -> Flat:
        """A sample's value on each of its tokens."""
        counts = np.array([len(each) for each in self.positions], np.int64)
        return split_rows(np.repeat(np.asarray(values, np.float32), counts), counts)

    def select(self, values: Sequence[NDArray[np.float32]]) -> Flat:
        """The trainable ones of values that were given for every response token."""
        return [value[mask] for value, mask in zip(values, self.masks, strict=True)]


def joined(arrays: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    """One after the other; also none."""
    return np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype)


def split_rows(rows: NDArray[Any], counts: Iterable[int] | NDArray[np.int64]) -> list[NDArray[Any]]:
    """The first so many rows, the next ones, and so on: views of all of them."""
    ends = np.cumsum([0, *counts]).tolist()
    return [rows[start:end] for start, end in pairwise(ends)]
