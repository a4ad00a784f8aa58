"""The default rollout function, with slime's names: what custom rollout code written for slime imports.

Every prompt goes through the router to an engine and every response to its reward; token ids go in and come
out, with the engine's log-probs, so nothing is ever tokenised twice.
"""

from __future__ import annotations

import argparse

from rltrain.data.source import RolloutDataSource
from rltrain.data.tokenizer import load_tokenizer
from rltrain.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from rltrain.rollout.batch import generate_and_grade, sampling_params
from rltrain.rollout.eval import eval_rollout
from rltrain.rollout.http import post
from rltrain.rollout.single_turn import generate

__all__ = ["GenerateState", "generate", "generate_rollout", "post"]


class GenerateState:
    """What a custom generation function may want besides its sample; cheap to make."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = load_tokenizer(args.hf_checkpoint)
        self.sampling_params = sampling_params(args)


async def generate_rollout(
    args: argparse.Namespace, rollout_id: int, data_source: RolloutDataSource, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """One batch of `--rollout-batch-size` groups, or one evaluation.

    Raises:
        RuntimeError: not one sample could be generated and graded.
    """
    if evaluation:
        return await eval_rollout(args, rollout_id)
    groups = data_source.get_samples(args.rollout_batch_size)
    samples = [sample for group in groups for sample in group]
    seconds = await generate_and_grade(args, samples, rollout_id, sampling_params(args))
    return RolloutFnTrainOutput(groups, seconds)
