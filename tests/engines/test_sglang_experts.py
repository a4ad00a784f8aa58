"""A model with a correction bias and a layer for further tokens in a real engine: at first, and after an export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.engine import load_weights
from helpers.megatron import init_single_process, make_actor, make_config, tiny_config, write_hf_model
from safetensors.torch import load_file, save_file

from rltrain.run.http import call
from rltrain.sglang.adapter import HttpServerEngineAdapter

pytestmark = pytest.mark.slow

TOKEN = "test-token-0123456789"
CONFIG = tiny_config(
    "Glm4MoeForCausalLM", n_routed_experts=8, num_experts_per_tok=4, moe_intermediate_size=16, n_group=4, topk_group=2
)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], 30).tolist()


def model(directory: Path, seed: int) -> Path:
    write_hf_model(directory, CONFIG, seed)
    file = directory / "model.safetensors"
    head = {"model.layers.2.eh_proj.weight": torch.randn(32, 64)}
    save_file(load_file(file) | head, file, metadata={"format": "pt"})
    return directory


def of_transformers(directory: Path) -> list[float]:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(IDS)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids[None]).logits[0]
    found: list[float] = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1).tolist()
    return found


def of_engine(engine: HttpServerEngineAdapter) -> list[float]:
    asked = {
        "input_ids": IDS,
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = call("POST", f"{engine.url}/generate", TOKEN, asked)
    return [logprob for logprob, *_ in answer["meta_info"]["input_token_logprobs"][1:]]


def decoded(engine: HttpServerEngineAdapter, directory: Path) -> tuple[list[float], list[float]]:
    """Log-probs of what the engine makes of prompts of several lengths in one batch: its own and transformers'."""
    from transformers import AutoModelForCausalLM

    asked = {"sampling_params": {"max_new_tokens": 6, "ignore_eos": True}, "return_logprob": True}
    prompts = [IDS[:length] for length in (5, 6, 9, 12)]
    answers = call("POST", f"{engine.url}/generate", TOKEN, {**asked, "input_ids": prompts})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    own, expected = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor(prompt + answer["output_ids"])
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected += log_probs.gather(1, ids[len(prompt) :, None]).squeeze(1).tolist()
        own += [logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]]
    return own, expected


def test_the_engine_has_the_trainers_log_probs(tmp_path: Path) -> None:
    from rltrain.megatron.exporter import Exporter

    init_single_process()
    first, second = model(tmp_path / "first", 0), model(tmp_path / "second", 1)
    actor = make_actor(make_config(second, use_dynamic_batch_size=True, max_tokens_per_gpu=1000), tmp_path)
    Exporter(actor.policy.models, actor.shape, second).write(tmp_path / "exported")
    arguments = {"model_path": str(first), "skip_tokenizer_init": True}
    with HttpServerEngineAdapter.launch(arguments, TOKEN) as engine:
        np.testing.assert_allclose(of_engine(engine), of_transformers(first), atol=1e-5)
        np.testing.assert_allclose(*decoded(engine, first), atol=1e-5)
        load_weights(engine, tmp_path / "exported", "1")
        np.testing.assert_allclose(of_engine(engine), of_transformers(second), atol=1e-5)
