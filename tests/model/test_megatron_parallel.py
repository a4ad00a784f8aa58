"""Two ranks against one: several steps, a checkpoint, and what is trained after resuming from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.megatron import (
    in_each_layout,
    init_single_process,
    make_actor,
    make_batch,
    make_config,
    run_ranks,
    tiny_config,
    tiny_experts_config,
    write_hf_model,
)

from rltrain.arguments.config import Config

pytestmark = pytest.mark.slow

PP2 = {"pipeline_model_parallel_size": 2}
# What a layout changes, and the model that it is tried with.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dp2": ("dense", {}),
    "dp2-distributed-optimizer": ("dense", {"use_distributed_optimizer": True}),
    "tp2-sp": ("dense", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": ("dense", PP2),
    "pp2-vpp2-distributed-optimizer": (
        "dense",
        PP2 | {"num_layers_per_virtual_pipeline_stage": 1, "use_distributed_optimizer": True},
    ),
    "cp2": ("dense", {"context_parallel_size": 2}),
    "ep2-distributed-optimizer": (
        "experts",
        {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
    ),
}
# Layouts that go on from what one rank has saved.
GOING_ON: dict[str, dict[str, Any]] = {"from-one-tp2": {"tensor_model_parallel_size": 2}, "from-one-pp2": PP2}
CONFIGS = {
    "dense": tiny_config(num_hidden_layers=4),
    "experts": tiny_experts_config(num_hidden_layers=2, mlp_only_layers=[]),
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


def train(config: Config, work: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Two rollouts and a checkpoint; the weights are those of a resumed trainer after a third rollout.

    Returns:
        Metrics, and on rank 0 the exported weights.
    """
    from safetensors.torch import load_file

    config = config.replace(save=str(work / "checkpoints"))
    # 11 samples: neither ranks nor steps divide them; of one step all but one sample are masked
    batches = [make_batch(11, seed=0), make_batch(4, seed=1, masked=3), make_batch(11, seed=2)]
    actor = make_actor(config, work)
    metrics = [actor.train(i, batches[i]) for i in range(2)]
    actor.save(1)
    resumed = make_actor(config, work)
    assert resumed.start_rollout_id == 2
    metrics.append(resumed.train(2, batches[2]))
    resumed.export(work / "exported")
    if os.environ.get("RANK", "0") != "0":
        return metrics, {}
    files = sorted((work / "exported").glob("*.safetensors"))  # one of every rank that has written a share
    weights = {name: tensor.numpy() for file in files for name, tensor in load_file(file).items()}
    return metrics, weights


def go_on(config: Config, work: Path) -> dict[str, float]:
    """The third rollout, from a checkpoint of another layout."""
    return make_actor(config, work).train(2, make_batch(11, seed=2))


def train_or_go_on(config: Config, work: Path) -> Any:
    return go_on(config, work) if work.name in GOING_ON else train(config, work)


def train_all(configs: dict[str, Config], work: Path) -> dict[str, Any]:
    """`train` in every layout, and `go_on` in those of `GOING_ON`."""
    return in_each_layout(train_or_go_on, configs, work)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for kind, config in CONFIGS.items():
        write_hf_model(directory / kind, config)
    return directory


@pytest.fixture(scope="module")
def single(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What one rank makes of each model, and where it has saved."""
    init_single_process()
    work = tmp_path_factory.mktemp("single")
    return {kind: train(make_config(models / kind, **COMMON), work / kind) for kind in CONFIGS}, work


@pytest.fixture(scope="module")
def double(
    models: Path, tmp_path_factory: pytest.TempPathFactory, single: tuple[dict[str, Any], Path]
) -> list[dict[str, Any]]:
    """What each of two ranks makes of every layout."""
    configs = {
        name: make_config(models / kind, **COMMON, actor_num_gpus_per_node=2, **changes)
        for name, (kind, changes) in LAYOUTS.items()
    }
    saved = str(single[1] / "dense" / "checkpoints")
    configs |= {
        name: make_config(models / "dense", **COMMON, actor_num_gpus_per_node=2, save=saved, **changes)
        for name, changes in GOING_ON.items()
    }
    return run_ranks(train_all, configs, tmp_path_factory.mktemp("double"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(
    layout: str, single: tuple[dict[str, Any], Path], double: list[dict[str, Any]]
) -> None:
    expected_metrics, expected = single[0][LAYOUTS[layout][0]]
    metrics, weights = double[0][layout]
    assert double[1][layout][0] == metrics  # every rank knows the same metrics
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-6)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert abs(weight - expected[name]).max() < 1e-5, name


@pytest.mark.parametrize("layout", GOING_ON)
def test_a_checkpoint_of_one_rank_goes_on_in_other_layouts(
    layout: str, single: tuple[dict[str, Any], Path], double: list[dict[str, Any]]
) -> None:
    assert double[0][layout] == pytest.approx(single[0]["dense"][0][2], rel=1e-4, abs=2e-6)
