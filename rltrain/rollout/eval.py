"""Evaluation: every prompt of every `--eval-prompt-data` set, with sampling parameters of its own."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from rltrain.data.prompt_set import PromptSet
from rltrain.rollout.base_types import RolloutFnEvalOutput
from rltrain.rollout.batch import SamplingParams, generate_and_grade, sampling_params
from rltrain.sample import Sample


async def eval_rollout(args: argparse.Namespace, rollout_id: int) -> RolloutFnEvalOutput:
    """Generate and grade all sets side by side.

    Raises:
        RuntimeError: not one sample of a set could be generated and graded.
    """
    eval_args = argparse.Namespace(**{**vars(args), "reward_key": args.eval_reward_key})
    names, paths = args.eval_prompt_data[::2], args.eval_prompt_data[1::2]
    sets = [eval_samples(eval_args, path) for path in paths]
    params = eval_sampling_params(args)
    await asyncio.gather(
        *(generate_and_grade(eval_args, samples, rollout_id, params, evaluation=True) for samples in sets)
    )
    return RolloutFnEvalOutput(
        {name: _summary(eval_args, samples) for name, samples in zip(names, sets, strict=True)}
    )


def eval_samples(args: argparse.Namespace, path: str) -> list[Sample]:
    """`--n-samples-per-eval-prompt` fresh samples of every prompt of a set."""
    prompts = PromptSet(args, [path], args.eval_input_key, args.eval_label_key)
    groups = prompts.groups(range(len(prompts)), args.n_samples_per_eval_prompt)
    return [sample for group in groups for sample in group]


def eval_sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The training parameters with what the `--eval-*` flags change."""
    return {
        **sampling_params(args),
        "temperature": args.eval_temperature,
        "top_p": args.eval_top_p,
        "top_k": args.eval_top_k,
        "max_new_tokens": args.eval_max_response_len,
    }


def _summary(args: argparse.Namespace, samples: list[Sample]) -> dict[str, Any]:
    """A sample that failed counts as a prompt that was not solved."""
    return {
        "rewards": [0.0 if sample.reward is None else sample.get_reward_value(args) for sample in samples],
        "truncated": [sample.status is Sample.Status.TRUNCATED for sample in samples],
        "samples": samples,
    }
