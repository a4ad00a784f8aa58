"""The gateway before a real router and engine: log-probs are those of a forward pass; the cache has earlier turns."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOKEN
from fakes.agents import params
from helpers.rollout import http_client

from rltrain import arguments
from rltrain.agents.gateway.server import Gateway
from rltrain.rollout.service.server import prepare
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.sglang.router import Router

pytestmark = pytest.mark.slow


def forward(model_dir: Path, tokens: list[int]) -> list[float]:
    """The log-prob of every token but the first, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1], dim=-1)
    return scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def test_turns_are_trained_with_the_log_probs_of_a_forward_pass(
    tiny_model: Path, prompt_file: Path, tmp_path: Path
) -> None:
    import openai  # a second, which the tests that do not ask it need not wait for

    flags = f"--hf-checkpoint {tiny_model} --prompt-data {prompt_file} --rm-type math --agent-gateway"
    flags += " --rollout-batch-size 1 --num-rollout 1 --rollout-max-response-len 24"
    config = prepare(arguments.parse(flags.split()), RunLayout(tmp_path))

    async def converse(router: Router) -> tuple[list[Sample], Any]:
        async with (
            http_client(config, router.url),
            Gateway(config, "127.0.0.1") as gateway,
            gateway.open(Sample(index=3, prompt="x"), params(config)) as session,
            openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as client,
        ):
            messages: list[Any] = []
            for _ in range(4):
                messages.append({"role": "user", "content": "what is 12 + 30?"})
                answer = await client.chat.completions.create(model=session.model, messages=messages)
                messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            messages[1]["content"] = "42"
            await client.chat.completions.create(model=session.model, messages=messages[:3])
            return session.samples(), session.turns

    # An engine of its own: the one that tests share samples by seeds, and has no cache.
    with (
        Router({}, TOKEN) as router,
        HttpServerEngineAdapter.launch({"model_path": str(tiny_model), "random_seed": 0}, TOKEN) as engine,
    ):
        engine.register(router.url)
        samples, turns = asyncio.run(converse(router))
    assert [turn.parent for turn in turns] == [None, 0, 1, 2, None]
    assert len(samples) == 2 and samples[0].effective_response_length == sum(
        turn.sampled_tokens for turn in turns[:4]
    )
    for sample in samples:
        expected = forward(tiny_model, sample.tokens)[sample.prompt_length - 1 :]
        for mask, ours, theirs in zip(
            sample.loss_mask or [], sample.rollout_log_probs or [], expected, strict=True
        ):
            assert not mask or ours == pytest.approx(theirs, abs=1e-4)
    possible = [before.prompt_tokens + before.sampled_tokens - 1 for before in turns[:3]]
    assert sum(turn.cached_tokens for turn in turns[1:4]) >= 0.95 * sum(possible)
