"""Hugging Face models in Megatron-core: the same numbers as transformers, and the same bytes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import (
    init_single_process,
    log_probs_of,
    make_actor,
    make_batch,
    make_config,
    tiny_config,
    write_config,
    write_hf_model,
)
from safetensors.torch import load_file

from rltrain.data.batch import TrainableTokens
from rltrain.run.errors import UserError

pytestmark = pytest.mark.slow

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": tiny_config(),
    "qwen3-tied": tiny_config(tie_word_embeddings=True, rope_theta=1e6),
    "qwen2": tiny_config("Qwen2ForCausalLM"),
    "qwen3-moe": tiny_config("Qwen3MoeForCausalLM", **EXPERTS, norm_topk_prob=True, mlp_only_layers=[1]),
    "qwen3-moe-plain": tiny_config("Qwen3MoeForCausalLM", **EXPERTS, norm_topk_prob=False),
    "glm4": tiny_config("Glm4ForCausalLM", pad_token_id=None, partial_rotary_factor=0.5),
    "llama": tiny_config("LlamaForCausalLM", num_key_value_heads=4),
    "llama3-rope": tiny_config("LlamaForCausalLM", rope_theta=5e5, rope_scaling=LLAMA3_ROPE),
    "llama3-rope-v5": tiny_config("LlamaForCausalLM", rope_parameters={"rope_theta": 5e5, **LLAMA3_ROPE}),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    init_single_process()
    return write_hf_model(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])


def hf_log_probs(directory: Path, tokens: np.ndarray, temperature: float) -> np.ndarray:
    """log p of every token but the first, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(ids.unsqueeze(0)).logits[0, :-1]
    return torch.log_softmax(logits / temperature, -1).gather(1, ids[1:, None]).squeeze(1).numpy()


def test_log_probs_equal_transformers(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(model_dir, rollout_temperature=0.7, micro_batch_size=3)
    actor = make_actor(config, tmp_path)
    batch = make_batch(7, longest=40)
    trainable = TrainableTokens.of(batch)
    ours = log_probs_of(actor, batch)
    for i, tokens in enumerate(batch.tokens):
        expected = hf_log_probs(model_dir, tokens, 0.7)[trainable.positions[i]]
        np.testing.assert_allclose(ours[i], expected, atol=1e-5, rtol=0)


def test_export_gives_the_same_bytes_back(model_dir: Path, tmp_path: Path) -> None:
    actor = make_actor(make_config(model_dir), tmp_path)
    actor.export(tmp_path / "exported")
    original, exported = (load_file(d / "model.safetensors") for d in (model_dir, tmp_path / "exported"))
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"]


def test_random_init_depends_on_the_seed_only(tmp_path: Path) -> None:
    init_single_process()
    directory = write_config(tmp_path / "model", tiny_config())
    config = make_config(directory, random_init=True)
    weights = []
    for number in range(2):
        init_single_process()
        make_actor(config, tmp_path).export(tmp_path / str(number))
        weights.append(load_file(tmp_path / str(number) / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert weights[0]["model.layers.0.mlp.gate_proj.weight"].std() > 0.05


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    init_single_process()
    directory = write_hf_model(tmp_path / "model", tiny_config())
    config = json.loads((directory / "config.json").read_text())
    del config["layer_types"]  # one a layer
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"no tensor model\.layers\.2"):
        make_actor(make_config(directory), tmp_path)
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(UserError, match="gate_proj"):
        make_actor(make_config(directory), tmp_path)


def test_the_text_part_of_a_model_with_images_is_trained_as_transformers_writes_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3_5Config

    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    text = tiny_config("Qwen3_5ForCausalLM", linear_value_head_dim=6, **linear)
    layers = {"layer_types": ["linear_attention", "full_attention"], "architectures": None}
    images = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(
        Qwen3_5Config(text_config=text | layers, vision_config=images | {"num_position_embeddings": 16}),
        dtype=torch.float32,
    )
    whole.save_pretrained(tmp_path / "whole")
    init_single_process()
    with pytest.raises(UserError, match="its text part, a Qwen3_5ForCausalLM"):
        make_actor(make_config(tmp_path / "whole"), tmp_path)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", dtype="auto"
    )  # as docs/adding_a_model.md says
    part = AutoModelForCausalLM.from_config(read.config, dtype=read.dtype)
    part.load_state_dict(read.state_dict())
    part.save_pretrained(tmp_path / "text")
    batch = make_batch(3, longest=40)
    ours = log_probs_of(make_actor(make_config(tmp_path / "text"), tmp_path), batch)
    for i, positions in enumerate(TrainableTokens.of(batch).positions):
        ids = torch.from_numpy(batch.tokens[i].astype(np.int64))
        with torch.no_grad():
            logits = whole.eval()(ids[None]).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1).numpy()[positions]
        np.testing.assert_allclose(ours[i], expected, atol=1e-5, rtol=0)
