"""The model and a calculator take turns: what stands in brackets is worked out, and the model goes on."""

from __future__ import annotations

import argparse
import re
from typing import Any

from rltrain.rollout.sglang_rollout import GenerateState
from rltrain.rollout.sglang_rollout import generate as generate_turn
from rltrain.sample import Sample

MOST_CALLS = 2


async def generate(args: argparse.Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Turns until the model ends without a call. What the calculator writes is not trained on."""
    tokenizer = GenerateState(args).tokenizer
    for _ in range(MOST_CALLS + 1):
        sample = await generate_turn(args, sample, {**sampling_params, "stop": ["]"]})
        call = re.search(r"\[([^\[\]]*)\]$", sample.response)
        if call is None or sample.status is not Sample.Status.COMPLETED:
            break
        result = calculate(call[1]) + ";"
        tokens = tokenizer.encode(result, add_special_tokens=False)
        sample.append_response_tokens(args, tokens=tokens, trainable=False, text=result)
    return sample


def calculate(expression: str) -> str:
    """The product of two whole numbers; a `?` for anything else."""
    match = re.fullmatch(r"(\d{1,4})\*(\d{1,4})", expression)
    return str(int(match[1]) * int(match[2])) if match else "?"


async def reward(args: argparse.Namespace, sample: Sample) -> float:
    """1 if what stands after the last result, or all of it without a call, is the label."""
    return float(sample.response.split(";")[-1] == sample.label)
