"""A router's correction bias: a weight of the model that gradients don't reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
from safetensors.torch import load_file

from rltrain.arguments.config import Config

EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
pytestmark = pytest.mark.slow

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two, with other random weights."""
    init_single_process()
    config = tiny_config("Glm4MoeForCausalLM", **EXPERTS)
    work = tmp_path_factory.mktemp("models")
    return [write_hf_model(work / str(seed), config, seed) for seed in (0, 1)]


def biases(models: list[Any]) -> torch.Tensor:
    return models[0].decoder.layers[1].mlp.router.expert_bias


def config_of(directory: Path, **given: Any) -> Config:
    """`given`: fields of megatron-core's TransformerConfig."""
    return make_config(
        directory, use_dynamic_batch_size=True, max_tokens_per_gpu=1000, megatron={"transformer": given}
    )


def test_other_weights_in_the_models_place_have_their_own(models: list[Path]) -> None:
    from rltrain.megatron.model.build import build_model, read_shape
    from rltrain.megatron.model.host_copy import SavedWeights
    from rltrain.megatron.model.load import load_hf_weights

    config = config_of(models[0])
    shape = read_shape(config)
    chunks = build_model(shape, config)
    load_hf_weights(chunks, shape, models[0])
    policy, reference = (load_file(model / "model.safetensors")[BIAS] for model in models)
    load_hf_weights(chunks, shape, models[1])
    saved = SavedWeights(chunks)
    load_hf_weights(chunks, shape, models[0])
    with saved.in_place_of(chunks):
        assert torch.equal(biases(chunks), reference)
    assert torch.equal(biases(chunks), policy) and not torch.equal(policy, reference)


@pytest.mark.parametrize("rate", [None, 0.25])
def test_it_moves_only_if_that_is_asked_for(models: list[Path], tmp_path: Path, rate: float | None) -> None:
    given = {} if rate is None else {"moe_router_bias_update_rate": rate}
    actor = make_actor(config_of(models[0], **given), tmp_path)
    before = biases(actor.policy.models).clone()
    actor.train(0, make_batch(8))
    moved = (biases(actor.policy.models) - before).abs()
    assert set(moved.tolist()) <= {0.0, rate or 0.0} and bool(moved.any()) == (rate is not None)


def test_a_model_in_bf16_exports_it_in_fp32(models: list[Path], tmp_path: Path) -> None:
    from rltrain.megatron.exporter import Exporter

    actor = make_actor(config_of(models[0]).replace(bf16=True), tmp_path)
    Exporter(actor.policy.models, actor.shape, models[0]).write(tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert torch.equal(exported[BIAS], load_file(models[0] / "model.safetensors")[BIAS])
    assert exported["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"
