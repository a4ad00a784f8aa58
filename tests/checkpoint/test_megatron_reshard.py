"""Checkpoints from one parallel layout to another: weights, optimizer, schedule and iteration."""

from __future__ import annotations

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
from rltrain.run.errors import UserError

pytestmark = pytest.mark.slow

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
TORCH = {"ckpt_format": "torch"}
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
    "tied": tiny_config(tie_word_embeddings=True),
    "experts": tiny_experts_config(num_hidden_layers=2, mlp_only_layers=[]),
}
# What is saved, and what it is loaded as, all on two ranks.
MOVES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dense", TP2, {}),
    ("dense", SHARDED, TP2 | SHARDED),
    ("dense", TP2 | SHARDED, PP2 | SHARDED),
    ("dense", PP2, CP2),
    # The shared embedding has a bucket of its own, which 61 × 32 numbers do not fill.
    ("tied", PP2 | SHARDED, PP2 | SHARDED),
    ("experts", EP2, PP2),
    ("experts", EP2 | SHARDED, SHARDED),
    ("experts", SHARDED, EP2 | SHARDED),
    ("dense", TP2 | TORCH, TP2 | TORCH),
]
BEFORE, AFTER = "before", "after"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        write_hf_model(root / name, config)
    return root


def train_and_save(config: Config, work: Path) -> dict[str, float]:
    """Two rollouts, a checkpoint, and the metrics of a third."""
    actor = make_actor(config, work)
    for i in range(2):
        actor.train(i, make_batch(8, seed=i))
    assert actor.save(1) is not None
    return actor.train(2, make_batch(8, seed=2))


def go_on(config: Config, work: Path) -> dict[str, float] | str:
    """The metrics of the third rollout, from the checkpoint, or why there are none."""
    try:
        actor = make_actor(config, work)
        assert actor.start_rollout_id == 2
        return actor.train(2, make_batch(8, seed=2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def every_move(
    configs: dict[str, Config], work: Path
) -> list[tuple[dict[str, float], dict[str, float] | str]]:
    """Of each move, in these processes, the metrics without it and with it, or why there are none."""
    parts = [
        {name: each for name, each in configs.items() if name.endswith(when)} for when in (BEFORE, AFTER)
    ]
    saved, gone_on = (
        in_each_layout(function, part, work)
        for part, function in zip(parts, (train_and_save, go_on), strict=True)
    )
    return [(saved[f"{number} {BEFORE}"], gone_on[f"{number} {AFTER}"]) for number in range(len(MOVES))]


def stable(metrics: dict[str, float]) -> dict[str, float]:
    """Without what is a time or a size in memory."""
    return {name: value for name, value in metrics.items() if name.startswith("train/")}


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def moved(models: Path, saves: Path) -> list[tuple[dict[str, float], dict[str, float] | str]]:
    """What two ranks make of every move."""
    configs = {
        f"{number} {when}": make_config(models / model, **COMMON, **layout, save=str(saves / f"c{number}"))
        for number, (model, before, after) in enumerate(MOVES)
        for when, layout in ((BEFORE, before), (AFTER, after))
    }
    return run_ranks(every_move, configs, saves / "work")[0]


@pytest.mark.parametrize("number", range(len(MOVES)))
def test_a_run_goes_on_in_another_layout(
    number: int, moved: list[tuple[dict[str, float], dict[str, float] | str]]
) -> None:
    expected, metrics = moved[number]
    assert isinstance(metrics, dict), metrics
    assert stable(metrics) == pytest.approx(stable(expected), rel=1e-4, abs=2e-6)


def test_the_torch_format_goes_on_bit_by_bit_and_says_which_layout_it_needs(
    moved: list[tuple[dict[str, float], dict[str, float] | str]], models: Path, saves: Path, tmp_path: Path
) -> None:
    number = MOVES.index(("dense", TP2 | TORCH, TP2 | TORCH))
    expected, metrics = moved[number]
    assert isinstance(metrics, dict)
    assert stable(metrics) == stable(expected)
    init_single_process()
    parts = r"tensor-model-parallel-size 2 \(now 1\).*--ckpt-format torch_dist"
    with pytest.raises(UserError, match=parts):
        make_actor(make_config(models / "dense", **COMMON, save=str(saves / f"c{number}")), tmp_path)
