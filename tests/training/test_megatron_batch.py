"""The trainer's view of a rollout: from Arrow, and which tokens are trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rltrain.data.batch import TrainableTokens, TrainBatch
from rltrain.schema import SCHEMA, TRAIN_COLUMNS

pytestmark = pytest.mark.slow

ROWS: list[dict[str, Any]] = [
    {"tokens": [1, 2, 3, 4], "response_length": 2, "loss_mask": [0, 1], "rollout_log_probs": [-1.0, -2.0]},
    {"tokens": [5, 6, 7], "response_length": 1, "loss_mask": [1], "rollout_log_probs": [-3.0]},
    {"tokens": [], "response_length": 0, "loss_mask": [], "rollout_log_probs": None},  # generation failed
]


def table(*rows: dict[str, Any]) -> pa.Table:
    full = [{"train_reward": float(i), **row} for i, row in enumerate(rows)]
    return pa.Table.from_pylist(full, schema=SCHEMA).select(TRAIN_COLUMNS)


def test_from_arrow() -> None:
    # two chunks, the second one a slice that begins in the middle of its buffers
    joined = pa.concat_tables([table(ROWS[0]), table(ROWS[2], *ROWS[1:]).slice(1)])
    batch = TrainBatch.from_arrow(joined)
    assert [tokens.tolist() for tokens in batch.tokens] == [row["tokens"] for row in ROWS]
    assert [mask.tolist() for mask in batch.loss_masks] == [row["loss_mask"] for row in ROWS]
    assert batch.response_lengths == [2, 1, 0] and batch.num_tokens == 7 and len(batch) == 3
    assert batch.train_rewards.tolist() == [0.0, 1.0, 2.0]
    assert batch.rollout_log_probs is not None
    assert [values.tolist() for values in batch.rollout_log_probs] == [[-1.0, -2.0], [-3.0], []]


def test_positions_predict_the_trainable_tokens() -> None:
    trainable = TrainableTokens.of(TrainBatch.from_arrow(table(*ROWS)))
    assert [positions.tolist() for positions in trainable.positions] == [[2], [1], []]
    assert [trainable.count(i) for i in range(3)] == [1, 1, 0]
    assert [values.tolist() for values in trainable.spread([7.0, 8.0, 9.0])] == [[7.0], [8.0], []]
    assert trainable.select([np.array([1.0, 2.0], np.float32)] + [np.ones(n, np.float32) for n in (1, 0)])[
        0
    ] == [2.0]


def test_log_probs_are_all_or_nothing() -> None:
    assert (
        TrainBatch.from_arrow(table(ROWS[0], {**ROWS[1], "rollout_log_probs": None})).rollout_log_probs
        is None
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": [1]}, "sample 0: 1 mask entries for 2 response tokens"),
        ({"tokens": [1, 2]}, "sample 0: no prompt"),
        ({"rollout_log_probs": [-1.0]}, "sample 0: 1 log-probs for 2 response tokens"),
        ({"tokens": None}, "column tokens is null for sample 0"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainBatch.from_arrow(table({**ROWS[0], **change}))
