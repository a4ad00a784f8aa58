"""The default rollout function, with slime's names: what custom rollout code written for slime imports.

Every prompt goes through the router to an engine and every response to its reward; token ids go in and come
out, with the engine's log-probs, so nothing is ever tokenised twice.
"""

from __future__ import annotations

import argparse
import asyncio

from rltrain.arguments.config import Config, group_of
from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.rollout import Rollout
from rltrain.data.source import RolloutDataSource
from rltrain.data.tokenizer import load_tokenizer
from rltrain.functions import load_function
from rltrain.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from rltrain.rollout.collect import collect
from rltrain.rollout.eval import eval_rollout
from rltrain.rollout.generate.group import check_failures, training_slots
from rltrain.rollout.generate.http import post, session_headers
from rltrain.rollout.generate.single_turn import generate, sampling_params
from rltrain.rollout.generate.timing import LoopLag
from rltrain.sglang.routers import get_model_url

__all__ = ["GenerateState", "generate", "generate_rollout", "get_model_url", "post", "session_headers"]


class GenerateState:
    """What a custom generation function may want besides its sample; cheap to make.

    Attributes:
        args: As given.
        tokenizer: The model's.
        processor: None: no model here takes images or sound.
        sampling_params: The flags' values, for training rollouts.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = load_tokenizer(args.hf_checkpoint)
        self.processor = None
        self.sampling_params = sampling_params(group_of(args, Rollout))

    @property
    def semaphore(self) -> asyncio.Semaphore:
        """A place for each request that may be in flight; generation functions are called with one already."""
        return training_slots(group_of(self.args, Engines), group_of(self.args, Debug))


async def generate_rollout(
    args: argparse.Namespace, rollout_id: int, data_source: RolloutDataSource, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """One batch of `--rollout-batch-size` groups, or one evaluation.

    Raises:
        RuntimeError: too many samples failed, or the filter kept too few groups.
    """
    config = Config.of(args)
    if evaluation:
        return await eval_rollout(config, rollout_id)
    async with LoopLag() as lag:
        collected = await collect(config, rollout_id, data_source)
    groups = collected.kept
    check_failures(config.rollout, [sample for group in groups for sample in group])
    if args.rollout_sample_filter_path:
        load_function(args.rollout_sample_filter_path, flag="--rollout-sample-filter-path")(args, groups)
    if args.rollout_all_samples_process_path:
        process = load_function(
            args.rollout_all_samples_process_path, flag="--rollout-all-samples-process-path"
        )
        process(args, collected.all, data_source)
    return RolloutFnTrainOutput(groups, collected.metrics | lag.metrics())
