"""What is refused about a model before anything is started, and what is read from its config.json."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from helpers.megatron import tiny_config, write_config

from rltrain.arguments.groups.parallel import Parallel
from rltrain.arguments.hf_config import check_hf_config, check_same_shape, read_model_shape
from rltrain.models import as_transformers
from rltrain.models.as_transformers import kept_standard_config, standard_config
from rltrain.models.lengths import check_engines_limit, check_sequences
from rltrain.models.rope import Rope
from rltrain.models.windows import check_engines
from rltrain.run.errors import UserError

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def check(config: dict[str, Any], tensor_parallel: int = 1, **changes: Any) -> None:
    parallel = Parallel(tensor_model_parallel_size=tensor_parallel, **changes)
    check_hf_config(config, parallel, "/models/m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM, which the trainer does not support"),
        ({"architectures": None, "model_type": "mamba"}, "model_type 'mamba'"),
        ({"attention_bias": True}, "attention_bias to true"),
        ({"model_type": "llama"}, "model_type 'llama' with the architecture Qwen3ForCausalLM"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "sets quantization_config .fp8."),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "Write them in bf16 .*Mxfp4Config"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
        ({"hidden_act": "gelu"}, 'hidden_act to "gelu"'),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers with sliding_attention, but"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types to chunked_attention"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        ({"pad_token_id": 61}, "pad_token_id 61"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_type 'dynamic'.* SGLang scales all by one factor",
        ),
        (
            {"rope_scaling": {"type": "longrope", "factor": 4.0}},
            "'longrope'.* supported for Phi-3 only",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "low_freq_factor of rope_type 'llama3' None",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 77},
            "77 beside",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_theta": 5e5}},
            "both rope_scaling .*'yarn'.* and rope_parameters .*500000",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(tiny_config(**changes))


def test_a_window_that_engines_lack_limits_sequences() -> None:
    shape = read_model_shape(tiny_config("MistralForCausalLM", sliding_window=8))
    for longest in (None, 9):
        with pytest.raises(UserError, match="--rollout-max-context-len 8"):
            check_engines(shape.window, shape.family.windows, longest, "/models/m")
    check_engines(shape.window, shape.family.windows, 8, "/models/m")
    check_engines(None, shape.family.windows, None, "/models/m")


LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}


def phi(**changes: Any) -> dict[str, Any]:
    others = {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 64, "pad_token_id": None}
    return tiny_config("Phi3ForCausalLM", **others, rope_scaling=LONG_ROPE | changes)


def test_longrope_limits_sequences() -> None:
    limit = read_model_shape(phi()).limit
    for longest in (None, 65):
        with pytest.raises(
            UserError, match=r"original_max_position_embeddings.*--rollout-max-context-len 64"
        ):
            check_engines_limit(limit, longest, "/models/m")
    check_engines_limit(limit, 64, "/models/m")
    with pytest.raises(UserError, match="a sequence has 65 tokens, and sequences of more than 64"):
        check_sequences(limit, [3, 65])
    check_sequences(limit, [3, 64])
    for short in (read_model_shape(tiny_config()).limit, None):
        check_engines_limit(short, None, "/models/m")


def test_longrope_that_sglang_reads_otherwise_is_refused() -> None:
    assert read_model_shape(phi(factor=8.0)).rope == read_model_shape(phi()).rope  # 512 tokens are 8 × 64
    for changes, message in (
        ({"factor": 4.0}, "factor 4.0 in its longrope"),
        ({"attention_factor": 1.5}, "attention_factor 1.5"),
        ({"short_mscale": 1.0}, "short_mscale"),
        ({"short_factor": [1.0]}, "4 rotated dimensions need half as many"),
        ({"long_factor": None}, "long_factor None"),
        ({"original_max_position_embeddings": 32}, "beside its rotary embedding, where it is 32"),
    ):
        with pytest.raises(UserError, match=message):
            read_model_shape(phi(**changes))


def indexed(**changes: Any) -> dict[str, Any]:
    latent = {"num_key_value_heads": 4, "q_lora_rank": 8}
    return tiny_config("GlmMoeDsaForCausalLM", **latent | {"head_dim": 64, "index_topk": 64} | changes)


def test_an_indexer_limits_sequences() -> None:
    limit = read_model_shape(indexed()).limit
    with pytest.raises(UserError, match=r"index_topk.* --rollout-max-context-len 64 or less"):
        check_engines_limit(limit, None, "/models/m")
    with pytest.raises(UserError, match="a sequence has 65 tokens"):
        check_sequences(limit, [65])
    check_engines_limit(limit, 64, "/models/m")
    for changes, message in (
        ({"q_lora_rank": None}, "no q_lora_rank, which its indexer needs"),
        ({"index_topk": 0}, "index_topk 0"),
        ({"index_head_dim": 2}, "index_head_dim 2, less than qk_rope_head_dim 64"),
        ({"indexer_types": ["shared", "full"]}, "full for the first"),
    ):
        with pytest.raises(UserError, match=message):
            read_model_shape(indexed(**changes))


def test_missing_entries_are_named() -> None:
    config = tiny_config()
    del config["hidden_size"], config["vocab_size"]
    with pytest.raises(UserError, match="lacks hidden_size, vocab_size"):
        check(config)


def test_tensor_parallel_must_divide_heads() -> None:
    check(tiny_config(), tensor_parallel=2)
    with pytest.raises(UserError, match="does not divide num_key_value_heads 2 of /models/m"):
        check(tiny_config(), tensor_parallel=4)


def test_experts_with_biases_are_not_split() -> None:
    config = tiny_config("GptOssForCausalLM", num_local_experts=4)
    check(config, tensor_parallel=2, sequence_parallel=True, expert_tensor_parallel_size=1)
    with pytest.raises(
        UserError, match=r"experts of /models/m have biases, .* --expert-tensor-parallel-size 1"
    ):
        check(config, tensor_parallel=2, sequence_parallel=True)
    with pytest.raises(UserError, match="does not divide num_attention_heads 4"):
        check(tiny_config(), tensor_parallel=3)


def test_layers_with_linear_attention_are_not_split_within_a_sequence() -> None:
    config = tiny_config("Qwen3NextForCausalLM", num_experts=4, num_experts_per_tok=2, linear_num_key_heads=2)
    sizes = config | {"linear_num_value_heads": 4, "num_hidden_layers": 8}
    check(sizes, tensor_parallel=2, sequence_parallel=True)
    assert read_model_shape(sizes).linear.layers == (0, 1, 2, 4, 5, 6)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"--context-parallel-size 2: /models/m has layers with linear"):
        check(sizes, context_parallel_size=2)
    with pytest.raises(UserError, match="does not divide linear_num_key_heads 3"):
        check(sizes | {"linear_num_key_heads": 3, "linear_num_value_heads": 3}, tensor_parallel=2)
    with pytest.raises(UserError, match="full_attention_interval 3, but layer_types gives"):
        check(config | {"full_attention_interval": 3, "layer_types": ["full_attention", "linear_attention"]})


def test_defaults_of_sparse_configurations() -> None:
    config = tiny_config("LlamaForCausalLM")
    for key in ("head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings"):
        del config[key]
    shape = read_model_shape(config)
    assert (shape.head_dim, shape.num_kv_heads) == (8, 4)
    assert (shape.rope, shape.tied_embeddings) == (Rope(10000.0), False)
    assert shape.qkv_bias is False


def test_the_share_that_is_rotated_of_both_transformers_generations() -> None:
    for more in ({}, {"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        config = tiny_config("Glm4ForCausalLM", pad_token_id=None, **more)
        assert read_model_shape(config).rope.percent == 0.5


def test_a_glm4_with_and_without_biases() -> None:
    for bias in (True, False):
        config = tiny_config("Glm4ForCausalLM", pad_token_id=None, attention_bias=bias)
        assert read_model_shape(config).qkv_bias is bias


def test_rope_of_both_transformers_generations() -> None:
    old = tiny_config(rope_theta=5e5, rope_scaling=LLAMA3 | {"type": "llama3"})
    new = tiny_config(rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3})
    del new["rope_theta"]
    for config in (old, new):
        rope = read_model_shape(config).rope
        assert (rope.theta, rope.factor, rope.original_positions) == (5e5, 32.0, 512)


def test_transformers_has_the_last_word(tmp_path: Path) -> None:
    config = tiny_config()
    standard = standard_config(write_config(tmp_path, config), config)
    assert standard is not None
    check_same_shape(config, standard, "/m")
    with pytest.raises(UserError, match=r"/m/config\.json means different models .* norm_eps 1e-06 and 0\.1"):
        check_same_shape(config, standard | {"rms_norm_eps": 0.1}, "/m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "32"}, r"transformers 5.* can't use .*config\.json: .*hidden_size"),
        (
            {"transformers_version": "99.1", "new_switch": 3},
            r"\(of transformers 99\.1\) has new_switch, which",
        ),
    ],
)
def test_what_transformers_refuses(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = tiny_config(**changes)
    with pytest.raises(UserError, match=message):
        standard_config(write_config(tmp_path, config), config)


def test_a_newer_transformers_that_says_nothing_new_is_fine(tmp_path: Path) -> None:
    config = tiny_config(transformers_version="99.1")
    assert standard_config(write_config(tmp_path, config), config) is not None


def test_what_transformers_says_is_kept_for_the_same_file_and_versions_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, kept = tiny_config(), tmp_path / "kept.json"
    directory = write_config(tmp_path / "model", config)
    first = kept_standard_config(directory, config, kept)
    assert first is not None
    content = kept.read_text()
    monkeypatch.setitem(sys.modules, "transformers", None)  # who asks it now gets no answer
    again = kept_standard_config(directory, config, kept)
    assert again is not None and read_model_shape(again) == read_model_shape(first)
    with pytest.raises(UserError, match="means different models"):  # the comparison itself is not kept
        check_same_shape(config | {"rms_norm_eps": 0.1}, again, "/m")

    kept.write_text(content[:-9])
    assert kept_standard_config(directory, config, kept) is None
    kept.write_text(content)
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: "99.1")
        assert kept_standard_config(directory, config, kept) is None
    (tmp_path / "as_transformers.py").write_text("# after a git pull")
    with monkeypatch.context() as patch:
        patch.setattr(as_transformers, "__file__", str(tmp_path / "as_transformers.py"))
        assert kept_standard_config(directory, config, kept) is None
    write_config(directory, config | {"new_switch": 3})
    assert kept_standard_config(directory, config, kept) is None
    assert kept.read_text() == content


def test_what_transformers_refuses_is_refused_every_time(tmp_path: Path) -> None:
    config, kept = tiny_config(hidden_size="32"), tmp_path / "kept.json"
    for _ in range(2):
        with pytest.raises(UserError, match="hidden_size"):
            kept_standard_config(write_config(tmp_path, config), config, kept)
    assert not kept.exists()
