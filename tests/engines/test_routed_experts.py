"""Routes of a real engine, replayed in the trainer: rounding then does no more to log-probs than without experts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.megatron import (
    init_single_process,
    log_probs_of,
    make_actor,
    make_config,
    tiny_config,
    tiny_experts_config,
    write_hf_model,
)

from rltrain.data.batch import TrainBatch
from rltrain.rollout.generate.single_turn import update_sample
from rltrain.run.http import call
from rltrain.sample import Sample
from rltrain.schema import samples_to_table
from rltrain.sglang.adapter import HttpServerEngineAdapter

pytestmark = pytest.mark.slow

TOKEN = "test-token-0123456789"
SIZES = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 4, "initializer_range": 0.2}
PROMPTS, NEW_TOKENS = 16, 48


def sampled(model: Path, **server_args: Any) -> TrainBatch:
    """A batch from an engine that computes in bf16."""
    args = {"model_path": str(model), "skip_tokenizer_init": True, "dtype": "bfloat16", "random_seed": 0}
    args |= server_args
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 61, 8).tolist() for _ in range(PROMPTS)]
    request = {
        "input_ids": prompts,
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "ignore_eos": True},
        "return_logprob": True,
        "return_routed_experts": "enable_return_routed_experts" in server_args,
    }
    with HttpServerEngineAdapter.launch(args, TOKEN) as engine:
        answers = call("POST", f"{engine.url}/generate", TOKEN, request)
    samples = [
        update_sample(Sample(index=i, group_index=i, prompt="p", tokens=prompts[i], reward=0.0), answer)
        for i, answer in enumerate(answers)
    ]
    table = samples_to_table(
        samples, step=0, attempt=0, dataset="train", rewards=[0.0] * PROMPTS, train_rewards=[0.0] * PROMPTS
    )
    return TrainBatch.from_arrow(table)


def gap(model: Path, batch: TrainBatch, run: Path, **changes: Any) -> float:
    """Mean |log π of trainer and engine|; the trainer computes in fp32."""
    ours = log_probs_of(make_actor(make_config(model, **changes), run), batch)
    assert batch.rollout_log_probs is not None
    return float(np.abs(np.concatenate(ours) - np.concatenate(batch.rollout_log_probs)).mean())


def test_with_the_engines_routes_the_gap_is_that_of_a_dense_model(tmp_path: Path) -> None:
    init_single_process()
    experts = write_hf_model(
        tmp_path / "experts",
        tiny_experts_config(
            **SIZES, num_experts=16, num_experts_per_tok=4, mlp_only_layers=[], moe_intermediate_size=32
        ),
    )
    batch = sampled(experts, enable_return_routed_experts=True)
    assert batch.routes is not None and batch.routes[0].shape == (8 + NEW_TOKENS - 1, 4 * 4)
    own = gap(experts, dataclasses.replace(batch, routes=None), tmp_path / "a")
    replayed = gap(experts, batch, tmp_path / "b", use_rollout_routing_replay=True)
    model = write_hf_model(tmp_path / "dense", tiny_config(**SIZES, intermediate_size=128))
    dense = gap(model, sampled(model), tmp_path / "c")
    print(f"mean gap: own routes {own:.4f}, the engine's {replayed:.4f}, dense {dense:.4f}")
    assert replayed < 0.7 * own
    assert replayed < 1.5 * dense
