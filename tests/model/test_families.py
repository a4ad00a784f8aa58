"""Every architecture, as a tiny random model with its own switches, against transformers; and on two ranks.

A new one needs an entry in `SWITCHES`; `test_config_sweep` goes through its configuration.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import (
    EXPERTS,
    GROUPED_EXPERTS,
    LATENT,
    LINEAR_AND_FULL,
    as_transformers_knows,
    gradient_of,
    in_each_layout,
    init_single_process,
    make_actor,
    make_batch,
    make_config,
    run_ranks,
    tiny_config,
    write_hf_model,
)
from safetensors.torch import load_file, save_file

from rltrain.arguments.config import Config
from rltrain.arguments.hf_config import read_model_shape
from rltrain.data.batch import TrainableTokens
from rltrain.models.families import FAMILIES
from rltrain.run.errors import UserError

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
LONGEST = 45  # tokens of the longest sample
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
TWO_SHARED_EXPERTS = GROUPED_EXPERTS | {"n_shared_experts": 2}
INDEXER = {"index_topk": LONGEST, "index_n_heads": 2, "index_head_dim": 8}
SWITCHES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "rope_parameters": ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 3.0}
    },
    "MistralForCausalLM": {"sliding_window": 7, "head_dim": 16},
    "GraniteForCausalLM": {
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "SmolLM3ForCausalLM": {"tie_word_embeddings": True, "pad_token_id": None, "no_rope_layers": [1, 0]},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "Qwen2MoeForCausalLM": EXPERTS | {"shared_expert_intermediate_size": 24, "norm_topk_prob": False},
    "Qwen3ForCausalLM": {"rope_parameters": ROPE | {"rope_type": "yarn", "beta_fast": 2.0}},
    "Qwen3MoeForCausalLM": EXPERTS | {"norm_topk_prob": True},
    "Qwen3NextForCausalLM": EXPERTS | LINEAR_AND_FULL,
    "Qwen3_5ForCausalLM": LINEAR_AND_FULL | {"attn_output_gate": True, "tie_word_embeddings": True},
    "Qwen3_5MoeForCausalLM": EXPERTS | LINEAR_AND_FULL,
    "Glm4MoeForCausalLM": TWO_SHARED_EXPERTS | {"use_qk_norm": True, "attention_bias": True},
    "Olmo2ForCausalLM": {"pad_token_id": None},
    "MiniMaxM2ForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4},
    "DeepseekV3ForCausalLM": LATENT
    | TWO_SHARED_EXPERTS
    | {
        "q_lora_rank": None,
        "rope_parameters": ROPE
        | {"rope_type": "yarn", "beta_fast": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    },
    "Glm4MoeLiteForCausalLM": LATENT
    | TWO_SHARED_EXPERTS
    | {"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5},
    "DeepseekV32ForCausalLM": LATENT | TWO_SHARED_EXPERTS | INDEXER,
    "GlmMoeDsaForCausalLM": LATENT
    | TWO_SHARED_EXPERTS
    | INDEXER
    | {"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "indexer_types": ["full", "shared"]},
    "Phi3ForCausalLM": {
        "pad_token_id": None,
        "partial_rotary_factor": 0.5,
        "sliding_window": 9,
        "original_max_position_embeddings": LONGEST,
        "rope_scaling": {"type": "longrope", "short_factor": [1.1, 1.7], "long_factor": [2.0, 9.0]},
    },
    "Gemma2ForCausalLM": {
        "pad_token_id": None,
        "query_pre_attn_scalar": 2,
        "sliding_window": 7,
        "attn_logit_softcapping": 0.3,
        "final_logit_softcapping": 0.4,
        "tie_word_embeddings": True,
    },
    "Gemma3ForCausalLM": {
        "pad_token_id": None,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 7,
        "rope_theta": 1000.0,
        "rope_local_base_freq": 50.0,
        "tie_word_embeddings": True,
    },
    "MiMoForCausalLM": {
        "num_nextn_predict_layers": 1,
        "auto_map": {"AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"},
    },
    "Glm4ForCausalLM": {"pad_token_id": None, "partial_rotary_factor": 0.5},
    "GptOssForCausalLM": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
        "swiglu_limit": 0.1,
        "rope_parameters": ROPE | {"rope_type": "yarn", "beta_fast": 2.0, "truncate": False},
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
}
OF_EXPERTS: dict[str, dict[str, Any]] = {  # each rank has half of the experts, whole
    "ep2": LAYOUTS["tp2"] | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
}

RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OWN_ATTENTION: dict[str, dict[str, Any]] = {"cp2": {"context_parallel_size": 2}}


def layouts(architecture: str) -> dict[str, dict[str, Any]]:
    family = FAMILIES[architecture]
    found = LAYOUTS | (OF_EXPERTS if family.experts else {}) | (OWN_ATTENTION if family.soft_caps else {})
    whole_experts = {"expert_tensor_parallel_size": 1} if family.biases else {}
    if family.linear:
        found |= {"pp2": LAYOUTS["pp2"] | RECOMPUTED}
        found |= {} if family.experts else {"tp2": LAYOUTS["tp2"] | {"sequence_parallel": False}}
    return {name: changes | whole_experts for name, changes in found.items()}


def config_of(directory: Path, **changes: Any) -> Config:
    return make_config(
        directory,
        loss_type="sft_loss",
        use_dynamic_batch_size=True,
        max_tokens_per_gpu=1000,
        log_probs_max_tokens_per_gpu=1000,
        **changes,
    )


def numbers(config: Config, work: Path) -> tuple[dict[int, Any], dict[str, Any]]:
    """log π of this rank's samples; and on rank 0 the gradients of an optimizer step, in Hugging Face's names."""
    from rltrain.megatron.model.export import export_hf_weights
    from rltrain.megatron.training.forward_backward import forward_backward, token_loss
    from rltrain.megatron.training.share import RankShare
    from rltrain.run.timing import Timers

    actor = make_actor(config, work)
    share = RankShare(config, actor.shape, make_batch(5, longest=40))
    log_probs = {i: each for i, each in enumerate(actor.log_probs(share)) if len(each)}
    inputs, _ = actor._prepare(0, share, share.loss_inputs(), Timers())
    forward_backward(actor.policy.wrapped, share.micro_batches(0, inputs), token_loss(actor.shape, config))
    gradients = export_hf_weights(actor.policy.models, actor.shape, gradient_of)
    return log_probs, {name: tensor.clone().numpy() for name, tensor in gradients}


def of_transformers(directory: Path, work: Path) -> tuple[dict[int, Any], dict[str, Any]]:
    """The same by transformers and autograd."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    entries = as_transformers_knows(json.loads((directory / "config.json").read_text()))
    known = CONFIG_MAPPING[entries["model_type"]].from_dict(entries)
    # Its other attention does not know of soft caps.
    caps = {"attn_implementation": "eager"} if known.model_type == "gemma2" else {}
    model = AutoModelForCausalLM.from_pretrained(directory, config=known, dtype=torch.float32, **caps)
    batch, log_probs = make_batch(5, longest=40), {}
    trainable = TrainableTokens.of(batch)
    for i, tokens in enumerate(batch.tokens):
        ids = torch.from_numpy(tokens.astype(np.int64))
        every = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        own = every[torch.from_numpy(trainable.positions[i])]
        (-own.mean() / len(batch.tokens)).backward()
        log_probs[i] = own.detach().numpy()
    with torch.no_grad():
        for weight in model.state_dict(keep_vars=True).values():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    model.save_pretrained(work)  # gives them the names of published weights
    gradients = load_file(work / "model.safetensors").items()
    return log_probs, {name: tensor.numpy() for name, tensor in gradients if ".indexer." not in name}


def add_head(directory: Path) -> None:
    """Give a model of two layers one more, to predict a token more."""
    file = directory / "model.safetensors"
    config = (directory / "config.json").read_text()
    is_beside = "MiMo" in config
    name = "model.mtp_layers.0.input_proj.weight" if is_beside else "model.layers.2.eh_proj.weight"
    name = "mtp.layers.0.self_attn.q_proj.weight" if "linear_num" in config else name
    head = {name: torch.randn(8, 16)}
    save_file(load_file(file) | head, file, metadata={"format": "pt"})


def all_families(configs: dict[str, Config], work: Path) -> dict[str, Any]:
    return in_each_layout(numbers, configs, work)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    init_single_process()
    work = tmp_path_factory.mktemp("families")
    found = {name: write_hf_model(work / name, tiny_config(name, **SWITCHES[name])) for name in FAMILIES}
    for name, directory in found.items():
        if FAMILIES[name].extra_heads:
            add_head(directory)
    return found


@pytest.fixture(scope="module")
def on_two(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    configs = {
        f"{name} {layout}": config_of(directory, actor_num_gpus_per_node=2, **changes)
        for name, directory in models.items()
        for layout, changes in layouts(name).items()
    }
    return run_ranks(all_families, configs, tmp_path_factory.mktemp("two"))


def check(
    ours: tuple[dict[int, Any], dict[str, Any]], expected: tuple[dict[int, Any], dict[str, Any]]
) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_allclose(mine[name], values, atol=TOLERANCE, rtol=0, err_msg=str(name))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_it_is_the_model_of_transformers(
    architecture: str, models: dict[str, Path], on_two: list[dict[str, Any]], tmp_path: Path
) -> None:
    expected = of_transformers(models[architecture], tmp_path / "gradients")
    check(numbers(config_of(models[architecture]), tmp_path), expected)
    for layout in layouts(architecture):
        check(on_two[0][f"{architecture} {layout}"], expected)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_checkpoint_gives_the_same_bytes_back(
    architecture: str, models: dict[str, Path], tmp_path: Path
) -> None:
    from rltrain.tools.convert_hf_to_torch_dist import main as to_torch_dist
    from rltrain.tools.convert_torch_dist_to_hf import main as to_hf

    original = models[architecture]
    saved = to_torch_dist([f"--hf-checkpoint={original}", f"--save={tmp_path / 'saved'}"])
    to_hf([f"--input-dir={saved.parent}", f"--origin-hf-dir={original}", f"--output-dir={tmp_path / 'back'}"])
    before, after = (load_file(path / "model.safetensors") for path in (original, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_is_trained_on_is_no_longer_than_longrope_allows(models: dict[str, Path]) -> None:
    from rltrain.megatron.training.share import RankShare

    config = config_of(models["Phi3ForCausalLM"])
    shape = read_model_shape(json.loads((models["Phi3ForCausalLM"] / "config.json").read_text()))
    shorter = replace(shape, rope=replace(shape.rope, original_positions=LONGEST - 1))
    with pytest.raises(UserError, match=f"a sequence has {LONGEST} tokens"):
        RankShare(config, shorter, make_batch(5, longest=40))


def test_the_docs_name_every_architecture() -> None:
    text = (Path(__file__).parents[2] / "docs" / "adding_a_model.md").read_text()
    assert [name for name in FAMILIES if f"| `{name}` |" not in text] == []
    assert SWITCHES.keys() == FAMILIES.keys()
