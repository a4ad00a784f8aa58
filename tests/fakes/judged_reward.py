"""A reward that asks a judge: how likely the judge finds the last token of the response."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from rltrain.rollout.sglang_rollout import get_model_url, post
from rltrain.sample import Sample


def question(tokens: list[int]) -> dict[str, Any]:
    """What the judge is asked."""
    params = {"max_new_tokens": 1, "temperature": 0}
    return {"input_ids": tokens, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}


def verdict(answer: dict[str, Any]) -> float:
    """The log-prob of the last token."""
    return answer["meta_info"]["input_token_logprobs"][-1][0]


async def ask_judge(args: Namespace, sample: Sample) -> float:
    """The reward."""
    return verdict(await post(get_model_url(args, "judge"), question(sample.tokens)))
