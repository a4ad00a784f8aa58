"""Evaluation: every prompt of every evaluation set, with sampling parameters and a reward of its own."""

from __future__ import annotations

import asyncio
from typing import Any

from rltrain.arguments.config import Config
from rltrain.arguments.groups.rollout import Rewards, Rollout
from rltrain.data.source import PromptSet
from rltrain.rollout.base_types import RolloutFnEvalOutput
from rltrain.rollout.generate.group import generate_and_grade
from rltrain.rollout.generate.single_turn import SamplingParams, sampling_params
from rltrain.rollout.train_data.convert import graded_reward
from rltrain.sample import Sample


async def eval_rollout(config: Config, rollout_id: int) -> RolloutFnEvalOutput:
    """Generate and grade all sets side by side.

    Raises:
        RuntimeError: too many samples of a set failed.
    """
    results = await asyncio.gather(
        *(_evaluate(config, rollout_id, each) for each in config.evaluation.eval_datasets)
    )
    return RolloutFnEvalOutput(
        {each["name"]: result for each, result in zip(config.evaluation.eval_datasets, results, strict=True)}
    )


async def _evaluate(config: Config, rollout_id: int, settings: dict[str, Any]) -> dict[str, Any]:
    own = config.of_eval_set(settings)
    samples = await asyncio.to_thread(eval_samples, own, settings)
    params = eval_sampling_params(config.rollout, settings)
    await generate_and_grade(own, samples, rollout_id, params, evaluation=True)
    graded = sum(sample.status is not Sample.Status.FAILED for sample in samples)
    if graded < settings.get("min_eval_samples", 0):
        print(
            f"warning: evaluation set {settings['name']} has {graded} samples that did not fail, fewer than its"
            f" min_eval_samples {settings['min_eval_samples']}: its scores say little",
            flush=True,
        )
    return _summary(own.rewards, samples)


def eval_samples(config: Config, settings: dict[str, Any]) -> list[Sample]:
    """`n_samples_per_eval_prompt` fresh samples of every prompt of a set."""
    prompts = PromptSet(config, [settings["path"]], settings["input_key"], settings.get("label_key"))
    groups = prompts.groups(range(len(prompts)), settings["n_samples_per_eval_prompt"])
    samples = [sample for group in groups for sample in group]
    for sample in samples:
        sample.metadata |= settings.get("metadata_overrides", {})
    return samples


def eval_sampling_params(rollout: Rollout, settings: dict[str, Any]) -> SamplingParams:
    """The training parameters with what the set changes."""
    return {
        **sampling_params(rollout),
        "temperature": settings["temperature"],
        "top_p": settings["top_p"],
        "top_k": settings["top_k"],
        "max_new_tokens": settings["max_response_len"],
        "min_new_tokens": settings.get("min_new_tokens", 0),
        "stop": settings.get("stop"),
        "stop_token_ids": settings.get("stop_token_ids"),
    }


def _summary(rewards: Rewards, samples: list[Sample]) -> dict[str, Any]:
    """A sample that failed counts as a prompt that was not solved."""
    return {
        "rewards": [graded_reward(rewards, sample) or 0.0 for sample in samples],
        "truncated": [sample.status is Sample.Status.TRUNCATED for sample in samples],
        "samples": samples,
    }
