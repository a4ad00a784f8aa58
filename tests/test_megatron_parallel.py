"""Data and tensor parallel training against one process: same losses, gradients, weights and checkpoints."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.megatron import make_actor, make_args, make_batch, run_ranks, tiny_config, write_hf_model

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"actor_num_gpus_per_node": 2},
    "dp2-distributed-optimizer": {"actor_num_gpus_per_node": 2, "use_distributed_optimizer": True},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
COMMON: dict[str, Any] = {
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 60,
    "log_probs_max_tokens_per_gpu": 40,
    "use_kl_loss": True,
    "kl_loss_coef": 0.05,
    "kl_loss_type": "k3",
    "entropy_coef": 0.01,
    "num_steps_per_rollout": 2,
    "eps_clip": 0.01,
    "adam_eps": 1e-3,  # with a tiny one Adam's first steps turn rounding of small gradients into ±lr
}


def train(args: argparse.Namespace, work: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Two rollouts and a checkpoint; the weights are those of a resumed trainer after a third rollout.

    Returns:
        Metrics, and on rank 0 the exported weights.
    """
    from safetensors.torch import load_file

    args.save = str(work / "checkpoints")
    # 11 samples: neither ranks nor steps divide them; of one step all but one sample are masked
    batches = [make_batch(11, seed=0), make_batch(4, seed=1, masked=3), make_batch(11, seed=2)]
    actor = make_actor(args, work)
    metrics = [actor.train(i, batches[i]) for i in range(2)]
    actor.save(1)
    resumed = make_actor(args, work)
    assert resumed.start_rollout_id == 2
    metrics.append(resumed.train(2, batches[2]))
    resumed.export(work / "exported")
    if os.environ["RANK"] != "0":
        return metrics, {}
    weights = load_file(work / "exported" / "model.safetensors")
    return metrics, {name: tensor.numpy() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("model"), tiny_config())


@pytest.fixture(scope="module")
def single(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    work = tmp_path_factory.mktemp("single")
    metrics, weights = run_ranks(train, make_args(model_dir, **COMMON), work, world_size=1)[0]
    return metrics, weights, work


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(
    layout: str, model_dir: Path, tmp_path: Path, single: tuple[Any, Any, Path]
) -> None:
    results = run_ranks(train, make_args(model_dir, **COMMON, **LAYOUTS[layout]), tmp_path)
    metrics, weights = results[0]
    assert results[1][0] == metrics  # every rank knows the same metrics
    for ours, expected in zip(metrics, single[0], strict=True):
        assert ours == pytest.approx(expected, rel=1e-4, abs=2e-6)
    assert weights.keys() == single[1].keys()
    for name, weight in weights.items():
        assert abs(weight - single[1][name]).max() < 1e-5, name


def resume_elsewhere(args: argparse.Namespace, work: Path) -> dict[str, float]:
    """The third rollout, from a checkpoint of another layout."""
    return make_actor(args, work).train(2, make_batch(11, seed=2))


def test_a_checkpoint_of_one_rank_goes_on_with_tensor_parallelism(
    model_dir: Path, tmp_path: Path, single: tuple[Any, Any, Path]
) -> None:
    args = make_args(model_dir, **COMMON, tensor_model_parallel_size=2, save=str(single[2] / "checkpoints"))
    metrics = run_ranks(resume_elsewhere, args, tmp_path)[0]
    assert metrics == pytest.approx(single[0][2], rel=1e-4, abs=2e-6)


WHITENED: dict[str, Any] = {
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 60,
    "log_probs_max_tokens_per_gpu": 40,
    "advantage_estimator": "reinforce_plus_plus",
    "kl_coef": 0.2,
    "gamma": 0.9,
    "normalize_advantages": True,
    "use_tis": True,
    "num_steps_per_rollout": 2,
    "adam_eps": 1e-3,
}


def train_twice(args: argparse.Namespace, work: Path) -> list[dict[str, float]]:
    """Metrics of two rollouts."""
    actor = make_actor(args, work)
    return [actor.train(i, make_batch(11, seed=i, masked=i)) for i in range(2)]


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_whitening_and_kl_in_the_reward_do_not_depend_on_the_ranks(
    layout: str, model_dir: Path, tmp_path: Path
) -> None:
    single = run_ranks(train_twice, make_args(model_dir, **WHITENED), tmp_path / "one", world_size=1)[0]
    args = make_args(model_dir, **WHITENED, **LAYOUTS[layout])
    for metrics in run_ranks(train_twice, args, tmp_path / "two"):
        for ours, expected in zip(metrics, single, strict=True):
            assert ours == pytest.approx(expected, rel=1e-4, abs=2e-6)
