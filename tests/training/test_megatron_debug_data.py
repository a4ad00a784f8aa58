"""A recorded batch trained on twice: the same bits, in the metrics, the weights and the inputs of the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.megatron import (
    init_single_process,
    make_actor,
    make_batch,
    make_config,
    tiny_config,
    write_hf_model,
)

from rltrain.arguments import UserError, parse
from rltrain.data.batch import TrainBatch
from rltrain.sample import Sample
from rltrain.schema import TRAIN_COLUMNS, samples_to_table

pytestmark = pytest.mark.slow


def record(path: Path) -> None:
    """A rollout as the rollout process writes it."""
    batch = make_batch(8)
    assert batch.rollout_log_probs is not None
    samples = [
        Sample(
            group_index=i, index=i, tokens=batch.tokens[i].tolist(), response_length=batch.response_lengths[i],
            loss_mask=batch.loss_masks[i].tolist(), rollout_log_probs=batch.rollout_log_probs[i].tolist(),
            status=Sample.Status.COMPLETED,
        )
        for i in range(8)
    ]  # fmt: skip
    rewards = batch.train_rewards.tolist()
    table = samples_to_table(
        samples, step=0, attempt=0, dataset="train", rewards=rewards, train_rewards=rewards
    )
    pq.write_table(table, path)


def test_replaying_a_recorded_batch_gives_the_same_bits(tmp_path: Path) -> None:
    init_single_process()
    model = write_hf_model(tmp_path / "model", tiny_config())
    record(tmp_path / "rollout.parquet")
    results, files = [], []
    for name in ("one", "two"):
        init_single_process()
        template = str(tmp_path / name / "{rollout_id}-{rank}.parquet")
        options = {
            "use_kl_loss": True,
            "kl_loss_coef": 0.1,
            "num_steps_per_rollout": 2,
            "micro_batch_size": 4,
        }
        config = make_config(model, save_debug_train_data=template, **options)
        actor = make_actor(config, tmp_path / name)
        batch = TrainBatch.from_arrow(pq.read_table(tmp_path / "rollout.parquet").select(TRAIN_COLUMNS))
        metrics = [actor.train(i, batch) for i in range(2)]
        kept = [{k: v for k, v in each.items() if k.startswith("train/")} for each in metrics]
        results.append((kept, [weight.detach().clone() for weight in actor.models[0].parameters()]))
        files.append([pq.read_table(tmp_path / name / f"{i}-0.parquet") for i in range(2)])
    assert results[0][0] == results[1][0]
    assert all(torch.equal(*pair) for pair in zip(results[0][1], results[1][1], strict=True))
    assert files[0] == files[1]
    table = files[0][0]
    assert {"advantages", "ref_log_probs", "old_log_probs", "weights"} <= set(table.column_names)
    batch = make_batch(8)
    for row in table.to_pylist():
        assert row["tokens"] == batch.tokens[row["sample"]].tolist()
        mask = np.array(row["loss_mask"])
        assert len(row["advantages"]) == mask.sum()
        assert row["advantages"] == pytest.approx([batch.train_rewards[row["sample"]]] * mask.sum())


@pytest.mark.parametrize(
    "name", ["x.parquet", "{rollout_id}.parquet", "{rollout_id}-{rank}.pt", "{step}.parquet"]
)
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(UserError, match="--save-debug-train-data"):
        parse(["--hf-checkpoint", "m", "--prompt-data", "p", "--rollout-batch-size", "1", "--num-rollout", "1",
               "--save-debug-train-data", name])  # fmt: skip
