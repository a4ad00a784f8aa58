"""An agent that simplifies a sum one step at a time, each in a context of its own: `3+4+5=` → `7+5`, `7+5=` → `12`.

Every step is a sample; all steps of a problem are one rollout, and share its reward.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

from rltrain.rollout.sglang_rollout import GenerateState
from rltrain.rollout.sglang_rollout import generate as generate_step
from rltrain.sample import Sample

MOST_STEPS = 4


async def generate(args: argparse.Namespace, sample: Sample, sampling_params: dict[str, Any]) -> list[Sample]:
    """The steps until one is a number."""
    tokenizer = GenerateState(args).tokenizer
    steps: list[Sample] = []
    while len(steps) < MOST_STEPS:
        step = copy.deepcopy(sample)
        if steps:  # it sees the step before it, and nothing else
            step.prompt = f"{steps[-1].response}="
            step.tokens = tokenizer.encode(step.prompt, add_special_tokens=False)
        steps.append(await generate_step(args, step, sampling_params))
        if step.status is not Sample.Status.COMPLETED or "+" not in step.response:
            break
    reward = float(steps[-1].response == sample.label)
    for step in steps:
        step.reward = reward
    return steps
