"""What is refused about a model before anything is started, and what is read from its config.json."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from helpers.megatron import tiny_config

from rltrain.arguments.errors import UserError
from rltrain.arguments.hf_config import check_hf_config, read_model_shape


def check(config: dict[str, Any], tensor_parallel: int = 1, **changes: Any) -> None:
    sizes: dict[str, Any] = {
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "num_virtual_stages_per_pipeline_rank": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "sequence_parallel": False,
    }
    check_hf_config(config, argparse.Namespace(hf_checkpoint="/models/m", **(sizes | changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM, which the trainer does not support"),
        ({"architectures": None, "model_type": "mamba"}, "model_type 'mamba'"),
        ({"attention_bias": True}, "sets attention_bias"),
        ({"architectures": ["Glm4ForCausalLM"], "attention_bias": False}, "attention_bias to false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"bits": 4}}, "sets quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
            "low_freq_factor 2.0",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(tiny_config(**changes))


def test_missing_entries_are_named() -> None:
    config = tiny_config()
    del config["hidden_size"], config["vocab_size"]
    with pytest.raises(UserError, match="lacks hidden_size, vocab_size"):
        check(config)


def test_tensor_parallel_must_divide_heads() -> None:
    check(tiny_config(), tensor_parallel=2)
    with pytest.raises(UserError, match="does not divide num_key_value_heads 2 of /models/m"):
        check(tiny_config(), tensor_parallel=4)
    with pytest.raises(UserError, match="does not divide num_attention_heads 4"):
        check(tiny_config(), tensor_parallel=3)


def test_defaults_of_sparse_configurations() -> None:
    config = tiny_config("LlamaForCausalLM")
    for key in ("head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings"):
        del config[key]
    shape = read_model_shape(config)
    assert (shape.head_dim, shape.num_kv_heads) == (8, 4)
    assert (shape.rope_theta, shape.rope_factor, shape.tied_embeddings) == (10000.0, None, False)
    assert (shape.family.qkv_bias, shape.rotary_percent) == (False, 1.0)


def test_the_share_that_is_rotated_of_both_transformers_generations() -> None:
    for more in ({}, {"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        assert read_model_shape(tiny_config("Glm4ForCausalLM", **more)).rotary_percent == 0.5


def test_rope_of_both_transformers_generations() -> None:
    old = tiny_config(rope_theta=5e5, rope_scaling={"type": "llama3", "factor": 32.0})
    new = tiny_config(rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", "factor": 32.0})
    del new["rope_theta"]
    for config in (old, new):
        shape = read_model_shape(config)
        assert (shape.rope_theta, shape.rope_factor) == (5e5, 32.0)
