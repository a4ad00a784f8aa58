"""A vocabulary that is padded over tensor parallel ranks: log-probs, export, checkpoints and the critic of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import (
    in_each_layout,
    init_single_process,
    log_probs_of,
    make_actor,
    make_batch,
    make_config,
    run_ranks,
    tiny_config,
    write_hf_model,
)

from rltrain.arguments.config import Config

pytestmark = pytest.mark.slow

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2, "actor_num_gpus_per_node": 2}
# 61 rows on two ranks: 48 and 13; 61 and none; of the tied model 48 and 13.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "16": ("untied", {"make_vocab_size_divisible_by": 16}),
    "a rank has only padding": ("untied", {"make_vocab_size_divisible_by": 128, "sequence_parallel": True}),
    "tied": ("tied", {"make_vocab_size_divisible_by": 16}),
}
COMMON: dict[str, Any] = {
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 1000,
    "log_probs_max_tokens_per_gpu": 1000,
    "advantage_estimator": "ppo",
    "entropy_coef": 0.01,
    "adam_eps": 1e-3,
    "use_distributed_optimizer": True,
}


def numbers(config: Config, work: Path) -> dict[str, Any]:
    """Log-probs, values and weights at the start; metrics of two rollouts, the second one from a checkpoint."""
    from rltrain.megatron.model.export import export_hf_weights
    from rltrain.megatron.training.share import RankShare

    config = config.replace(save=str(work / "checkpoints"), critic_save=str(work / "critic"))
    batch = make_batch(6, longest=20)
    actor = make_actor(config, work)
    share = RankShare(config, actor.shape, batch)
    assert actor.critic is not None
    found = {"log_probs": log_probs_of(actor, batch), "values": actor.critic.values(share)}
    tensors = export_hf_weights(actor.policy.models, actor.shape)
    found["weights"] = {name: tensor.clone().numpy() for name, tensor in tensors}
    found["first"] = actor.train(0, batch)
    actor.save(0)
    resumed = make_actor(config, work)
    assert resumed.start_rollout_id == 1
    found["second"] = resumed.train(1, make_batch(6, seed=1))
    return found


def go_on(config: Config, work: Path) -> dict[str, float]:
    """The second rollout, from what one rank has saved."""
    return make_actor(config, work).train(1, make_batch(6, seed=1))


def all_layouts(configs: dict[str, Config], work: Path) -> dict[str, Any]:
    own = {name: each for name, each in configs.items() if name in LAYOUTS}
    others = {name: each for name, each in configs.items() if name not in LAYOUTS}
    return in_each_layout(numbers, own, work) | in_each_layout(go_on, others, work)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one rank makes of each model, and what two make of each layout."""
    init_single_process()
    work = tmp_path_factory.mktemp("padding")
    models = {
        kind: write_hf_model(work / kind, tiny_config(tie_word_embeddings=kind == "tied"))
        for kind in ("untied", "tied")
    }
    single = {
        kind: numbers(make_config(path, **COMMON), work / f"one-{kind}") for kind, path in models.items()
    }
    configs = {
        name: make_config(models[kind], **COMMON, **TP2, **changes)
        for name, (kind, changes) in LAYOUTS.items()
    }
    saved = {"save": str(work / "one-untied/checkpoints"), "critic_save": str(work / "one-untied/critic")}
    configs["from one"] = configs["16"].replace(**saved)
    return single, run_ranks(all_layouts, configs, work / "two")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_changes_nothing(layout: str, found: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    expected, ours = found[0][LAYOUTS[layout][0]], found[1][0][layout]
    for what in ("log_probs", "values"):
        for mine, theirs in zip(ours[what], expected[what], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=0)
    assert ours["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert np.array_equal(ours["weights"][name], weight), name
    for which in ("first", "second"):
        assert found[1][1][layout][which] == ours[which]
        assert ours[which] == pytest.approx(expected[which], rel=1e-4, abs=2e-6)


def test_a_checkpoint_without_padding_goes_on_with_it(
    found: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    assert found[1][0]["from one"] == pytest.approx(found[0]["untied"]["second"], rel=1e-4, abs=2e-6)


def load_with_one_bad_rank(config: Config, work: Path) -> str:
    """What each rank is told where only the last one's pipeline stage lacks a tensor."""
    try:
        make_actor(config, work)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def test_what_one_rank_finds_wrong_all_raise(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = write_hf_model(tmp_path / "model", tiny_config())
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, directory / "model.safetensors")
    config = make_config(directory, pipeline_model_parallel_size=2, actor_num_gpus_per_node=2)
    told = run_ranks(load_with_one_bad_rank, config, tmp_path / "ranks")
    assert told[0] == told[1]
    assert told[0].startswith("UserError: model.norm.weight in") and "(rank 1)" in told[0]
