"""PPO split over four ranks against one process: policy, critic, skipped steps, checkpoints, recorded tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.megatron import (
    in_each_layout,
    init_single_process,
    make_actor,
    make_batch,
    make_config,
    run_ranks,
    tiny_config,
    write_hf_model,
)

from rltrain.arguments.config import Config

pytestmark = pytest.mark.slow

TP2, PP2 = ({f"{name}_model_parallel_size": 2} for name in ("tensor", "pipeline"))
CP2 = {"context_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4-sharded": {"use_distributed_optimizer": True},
    "tp2-sp": TP2 | {"sequence_parallel": True},
    "pp2-vpp2": PP2 | {"num_layers_per_virtual_pipeline_stage": 1},
    "cp2": CP2,
    "tp2-pp2-sp": TP2 | PP2 | {"sequence_parallel": True},
    "pp2-cp2-sharded": PP2 | CP2 | {"use_distributed_optimizer": True},
}
COMMON: dict[str, Any] = {
    "advantage_estimator": "ppo", "gamma": 0.9, "lambd": 0.8, "kl_coef": 0.1, "critic_lr": 2e-3, "lr": 2e-3,
    "normalize_advantages": True, "num_steps_per_rollout": 2, "adam_eps": 1e-3, "use_opsm": True,
    "use_dynamic_batch_size": True, "max_tokens_per_gpu": 30, "log_probs_max_tokens_per_gpu": 40,
    "ref_update_interval": 1, "keep_old_actor": True, "debug_train_only": True, "use_tis": True,
    "use_rollout_entropy": True,
}  # fmt: skip


def train(config: Config, work: Path) -> dict[str, Any]:
    """Three rollouts: the second has a sample with an infinite reward, before the third the run is resumed."""
    config = config.replace(save=str(work / "checkpoints"))
    batches = [make_batch(13, seed=seed, masked=1) for seed in range(3)]
    rewards = batches[1].train_rewards.copy()
    rewards[-1] = np.inf  # in the second optimizer step; whitening carries it to every token
    batches[1] = dataclasses.replace(batches[1], train_rewards=rewards)
    actor = make_actor(config, work)
    metrics = []
    for i in range(2):
        actor.update_weights(list, i)
        metrics.append(actor.train(i, batches[i]))
    actor.save(1)
    resumed = make_actor(config, work)
    assert resumed.start_rollout_id == 2
    resumed.update_weights(list, 2)
    metrics.append(resumed.train(2, batches[2]))
    resumed._tokens.wait()
    events = [fields["not_finite"] for kind, fields in actor._registry.events if kind == "step_skipped"]
    return {"metrics": metrics, "events": events}


def train_in_each_layout(configs: dict[str, Config], work: Path) -> dict[str, dict[str, Any]]:
    """`train` in one layout after the other, within the same processes."""
    return in_each_layout(train, configs, work)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(num_hidden_layers=4, tie_word_embeddings=True)
    return write_hf_model(tmp_path_factory.mktemp("model"), config)


@pytest.fixture(scope="module")
def single(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    init_single_process()
    work = tmp_path_factory.mktemp("single")
    return train(make_config(model_dir, **COMMON), work), work


@pytest.fixture(scope="module")
def on_four(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[list[dict[str, Any]], Path]:
    items = [item for item in request.session.items if item.path == Path(__file__)]
    wanted = [item.callspec.params["layout"] for item in items]
    work = tmp_path_factory.mktemp("four")
    configs = {
        name: make_config(model_dir, actor_num_gpus_per_node=4, **COMMON, **LAYOUTS[name]) for name in wanted
    }
    return run_ranks(train_in_each_layout, configs, work, world_size=4), work


def tokens_of(work: Path, step: int) -> dict[str, np.ndarray]:
    table = pq.read_table(work / f"rollouts_trainer/step={step:06d}/attempt=0/part-0.parquet")
    return {
        name: np.concatenate([np.array(row) for row in table[name].to_pylist() if row is not None])
        for name in ("trainer_log_probs", "trainer_entropies", "advantages")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_ranks_equal_one(
    layout: str, single: tuple[dict[str, Any], Path], on_four: tuple[list[dict[str, Any]], Path]
) -> None:
    expected, ranks = single[0], [rank[layout] for rank in on_four[0]]
    assert expected["events"] and ranks[0]["events"] == expected["events"]
    for rank in ranks:
        assert rank["metrics"] == ranks[0]["metrics"]
    for ours, theirs in zip(ranks[0]["metrics"], expected["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    for step in (0, 2):
        theirs = tokens_of(single[1], step)
        for name, ours in tokens_of(on_four[1] / layout, step).items():
            np.testing.assert_allclose(ours, theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)
