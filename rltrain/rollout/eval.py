"""Evaluation: every prompt of every evaluation set, with sampling parameters and a reward of its own."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from rltrain.arguments.eval_sets import set_args
from rltrain.data.prompt_set import PromptSet
from rltrain.rollout.base_types import RolloutFnEvalOutput
from rltrain.rollout.batch import SamplingParams, generate_and_grade, sampling_params
from rltrain.sample import Sample


async def eval_rollout(args: argparse.Namespace, rollout_id: int) -> RolloutFnEvalOutput:
    """Generate and grade all sets side by side.

    Raises:
        RuntimeError: too many samples of a set failed.
    """
    results = await asyncio.gather(*(_evaluate(args, rollout_id, each) for each in args.eval_datasets))
    return RolloutFnEvalOutput(
        {each["name"]: result for each, result in zip(args.eval_datasets, results, strict=True)}
    )


async def _evaluate(args: argparse.Namespace, rollout_id: int, settings: dict[str, Any]) -> dict[str, Any]:
    own = set_args(args, settings)
    samples = await asyncio.to_thread(eval_samples, own, settings)
    params = eval_sampling_params(args, settings)
    await generate_and_grade(own, samples, rollout_id, params, evaluation=True)
    return _summary(own, samples)


def eval_samples(args: argparse.Namespace, settings: dict[str, Any]) -> list[Sample]:
    """`n_samples_per_eval_prompt` fresh samples of every prompt of a set."""
    prompts = PromptSet(args, [settings["path"]], settings["input_key"], settings.get("label_key"))
    groups = prompts.groups(range(len(prompts)), settings["n_samples_per_eval_prompt"])
    return [sample for group in groups for sample in group]


def eval_sampling_params(args: argparse.Namespace, settings: dict[str, Any]) -> SamplingParams:
    """The training parameters with what the set changes."""
    return {
        **sampling_params(args),
        "temperature": settings["temperature"],
        "top_p": settings["top_p"],
        "top_k": settings["top_k"],
        "max_new_tokens": settings["max_response_len"],
        "min_new_tokens": settings.get("min_new_tokens", 0),
        "stop": settings.get("stop"),
        "stop_token_ids": settings.get("stop_token_ids"),
    }


def _summary(args: argparse.Namespace, samples: list[Sample]) -> dict[str, Any]:
    """A sample that failed counts as a prompt that was not solved."""
    return {
        "rewards": [0.0 if sample.reward is None else sample.get_reward_value(args) for sample in samples],
        "truncated": [sample.status is Sample.Status.TRUNCATED for sample in samples],
        "samples": samples,
    }
