"""Checkpoints from one parallel layout to another: weights, optimizer, schedule and iteration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from helpers.megatron import make_actor, make_args, make_batch, run_ranks, tiny_config, write_hf_model

from rltrain.arguments.errors import UserError

pytestmark = pytest.mark.slow

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
COMMON: dict[str, Any] = {
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 60,
    "log_probs_max_tokens_per_gpu": 60,
    "adam_eps": 1e-3,
    "lr_decay_style": "cosine",
    "num_rollout": 4,
}
CONFIGS = {
    "dense": tiny_config(),
    "experts": tiny_config(
        "Qwen3MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        mlp_only_layers=[],
    ),
}
# what is saved, and what it is loaded as; layouts on two ranks, except for {} with "one"
MOVES: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    ("dense", TP2, {}, 1),
    ("dense", SHARDED, SHARDED, 1),
    ("dense", SHARDED, TP2 | SHARDED, 2),
    ("dense", TP2 | SHARDED, PP2 | SHARDED, 2),
    ("dense", PP2, {}, 1),
    ("dense", PP2 | SHARDED, CP2 | SHARDED, 2),
    ("experts", EP2, PP2, 2),
    ("experts", EP2 | SHARDED, SHARDED, 1),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        write_hf_model(root / name, config)
    return root


def train_and_save(args: argparse.Namespace, work: Path) -> dict[str, float]:
    """Two rollouts, a checkpoint, and the metrics of a third."""
    actor = make_actor(args, work)
    for i in range(2):
        actor.train(i, make_batch(8, seed=i))
    assert actor.save(1) is not None
    return actor.train(2, make_batch(8, seed=2))


def go_on(args: argparse.Namespace, work: Path) -> dict[str, float]:
    """The third rollout, from the checkpoint."""
    actor = make_actor(args, work)
    assert actor.start_rollout_id == 2
    metrics = actor.train(2, make_batch(8, seed=2))
    return metrics | {f"again/{name}": value for name, value in actor.train(3, make_batch(8)).items()}


@pytest.mark.parametrize(("model", "before", "after", "ranks"), MOVES)
def test_a_run_goes_on_in_another_layout(
    models: Path, tmp_path: Path, model: str, before: dict[str, Any], after: dict[str, Any], ranks: int
) -> None:
    save = {"save": str(tmp_path / "c")}
    args = make_args(models / model, **COMMON, **before, **save)
    expected = run_ranks(train_and_save, args, tmp_path / "before")[0]
    args = make_args(models / model, **COMMON, **after, **save)
    metrics = run_ranks(go_on, args, tmp_path / "after", world_size=ranks)[0]
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=2e-6), name


def load_or_complain(args: argparse.Namespace, work: Path) -> str:
    """What each rank says of a checkpoint."""
    try:
        make_actor(args, work)
    except UserError as error:
        return str(error)
    return "loaded"


def test_the_torch_format_says_which_layout_it_needs(models: Path, tmp_path: Path) -> None:
    legacy = {"ckpt_format": "torch", "save": str(tmp_path / "c")}
    args = make_args(models / "dense", **COMMON, **TP2, **legacy)
    expected = run_ranks(train_and_save, args, tmp_path / "before")[0]
    assert (
        run_ranks(go_on, args, tmp_path / "same")[0] | expected == run_ranks(go_on, args, tmp_path / "x")[0]
    )
    args = make_args(models / "dense", **COMMON, **legacy)
    said = run_ranks(load_or_complain, args, tmp_path / "after", world_size=1)[0]
    for part in ("tensor-model-parallel-size 2 (now 1)", "--ckpt-format torch_dist"):
        assert part in said
