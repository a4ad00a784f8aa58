"""What the trainer writes of its tokens and steps: columns, speed and memory, the gap to the engine."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.megatron import (
    log_probs_of,
    make_actor,
    make_batch,
    make_config,
)

from rltrain.data.batch import TrainableTokens

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("steps", [1, 2])
def test_the_trainer_writes_what_it_saw_of_every_token(model_dir: Path, tmp_path: Path, steps: int) -> None:
    batch = dataclasses.replace(make_batch(7, masked=2), indices=np.arange(70, 77))
    config = make_config(
        model_dir, num_steps_per_rollout=steps, advantage_estimator="reinforce_plus_plus", gamma=0.5
    )
    actor = make_actor(config, tmp_path)
    expected, trainable = log_probs_of(actor, batch), TrainableTokens.of(batch)
    actor.train(3, batch)
    actor._tokens.wait()
    table = pq.read_table(tmp_path / "rollouts_trainer/step=000003/attempt=0/part-0.parquet")
    from rltrain.schema import TRAINER_SCHEMA

    assert table.schema.equals(TRAINER_SCHEMA)
    rows = table.to_pylist()
    assert [row["index"] for row in rows] == list(range(70, 77)) and {row["step"] for row in rows} == {3}
    for i, row in enumerate(rows):
        if i < 2:
            assert row["trainer_log_probs"] is row["trainer_entropies"] is row["advantages"] is None
            continue
        mask, found = trainable.masks[i], np.array(row["trainer_log_probs"])
        np.testing.assert_allclose(found[mask], expected[i], atol=1e-5)
        assert np.isnan(found[~mask]).all() and len(row["trainer_entropies"]) == len(mask)
        assert (np.array(row["trainer_entropies"])[mask] > 0).all()
        assert np.array(row["advantages"])[mask][-1] == pytest.approx(batch.train_rewards[i])
    assert not list((tmp_path / "rollouts_trainer").rglob(".*"))


def test_tokens_that_cannot_be_written_do_not_stop_the_training(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "rollouts_trainer").write_text("in the way")
    actor = make_actor(make_config(model_dir), tmp_path)
    before = set(threading.enumerate())
    for step in range(3):
        actor.train(step, make_batch(4))
    writers = [each for each in set(threading.enumerate()) - before if "trainer-tokens" in each.name]
    assert len(writers) <= 1  # not one a step
    kind, fields = actor._registry.events[-1]
    assert kind == "trainer_tokens_not_saved" and "Error" in fields["reason"]
    quiet = make_actor(make_config(model_dir, save_trainer_tokens=False), tmp_path / "quiet")
    quiet.train(0, make_batch(4))
    quiet._tokens.wait()
    assert not (tmp_path / "quiet" / "rollouts_trainer").exists()


def test_metrics_of_speed_and_memory(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.megatron import RecordingRegistry

    from rltrain.megatron.actor import MegatronTrainActor
    from rltrain.megatron.training import speed
    from rltrain.run.role import RoleContext

    monkeypatch.setattr(speed, "peak_flops", lambda: 1e12)
    context = RoleContext(tmp_path, 0, "trainer", 0, "", "")
    config = make_config(model_dir, use_kl_loss=True, num_steps_per_rollout=2, advantage_estimator="ppo")
    actor = MegatronTrainActor(config, context, RecordingRegistry())  # type: ignore[arg-type]
    batch = make_batch(8)
    metrics = actor.train(0, batch)
    for phase in ("ref_log_probs", "log_probs", "critic_train", "actor_train"):
        assert 0 < metrics[f"perf/{phase}_s"] < metrics["perf/train_all_s"]
    whole = metrics["perf/tokens_per_s_per_rank"] * metrics["perf/train_all_s"]
    assert whole == pytest.approx(batch.num_tokens)
    assert metrics["perf/mfu"] == pytest.approx(metrics["perf/tflops_per_rank"])
    assert 0.05 < metrics["perf/peak_memory_gib"] < 100
    json.dumps(metrics, allow_nan=False)


def test_the_gap_to_the_engine_is_measured_three_ways(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(5)
    actor = make_actor(make_config(model_dir), tmp_path)
    trainable = TrainableTokens.of(batch)
    gap = np.concatenate(
        [own - engine for own, engine in zip(
            log_probs_of(actor, batch), trainable.select(batch.rollout_log_probs), strict=True)]
    ).astype(np.float64)  # fmt: skip
    metrics = actor.train(0, batch)
    assert metrics["train/logprob_abs_diff"] == pytest.approx(np.abs(gap).mean(), rel=1e-4)
    assert metrics["train/logprob_abs_diff_max"] == pytest.approx(np.abs(gap).max(), rel=1e-4)
    assert metrics["train/logprob_k3"] == pytest.approx((np.exp(gap) - 1 - gap).mean(), rel=1e-4)


def test_mismatch_is_measured_without_being_corrected(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(6)
    plain, measured, corrected = (
        make_actor(make_config(model_dir, **options), tmp_path).train(0, batch)
        for options in ({}, {"get_mismatch_metrics": True}, {"use_tis": True})
    )
    assert measured["train/grad_norm"] == plain["train/grad_norm"]
    assert measured["train/tis"] == corrected["train/tis"] and "train/tis" not in plain
    assert corrected["train/grad_norm"] != plain["train/grad_norm"]
