"""The names that functions written for slime import: change these lines to `from rltrain.slime import …`.

docs/from_slime.md says which of slime's modules each name comes from, and what is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

from rltrain import functions
from rltrain.arguments.config import Config
from rltrain.data.conversation import tokens_and_mask
from rltrain.data.source import RolloutDataSource
from rltrain.data.tokenizer import load_tokenizer
from rltrain.rewards import pool
from rltrain.rewards.text import dapo, last_boxed
from rltrain.rollout import sglang_rollout
from rltrain.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from rltrain.rollout.filters import DynamicFilterOutput, check_reward_nonzero_std
from rltrain.rollout.generate.group import GroupRunner
from rltrain.rollout.generate.http import client_loop, get, post
from rltrain.rollout.sglang_rollout import GenerateState, generate, get_model_url
from rltrain.sample import Message, Sample

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

__all__ = [
    "DynamicFilterOutput",
    "GenerateState",
    "MetricGatherer",
    "MultiTurnLossMaskGenerator",
    "RolloutDataSource",
    "RolloutFnEvalOutput",
    "RolloutFnTrainOutput",
    "Sample",
    "all_gather_with_cp",
    "async_rm",
    "batched_async_rm",
    "call_dynamic_filter",
    "check_reward_nonzero_std",
    "compute_score",
    "generate",
    "generate_and_rm",
    "generate_and_rm_group",
    "generate_rollout",
    "get",
    "get_model_url",
    "get_response_lengths",
    "load_function",
    "load_tokenizer",
    "post",
    "run",
    "slice_log_prob_with_cp",
]


def load_function(path: str) -> Callable[..., Any]:
    """Import the function that `path` names.

    Raises:
        UserError: there is none.
    """
    return functions.load_function(path, flag="load_function")


async def generate_and_rm(
    args: argparse.Namespace, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample | list[Sample]:
    """Fill a sample with the generation function of the flags, run the hooks and, without --group-rm, grade it.

    For rollout functions, in the event loop of the rollout process. A sample that is finished stays as it is, and one
    whose function raises is FAILED, with the reason in `failure`. --max-staleness is not looked at.

    Returns:
        The sample, or the samples that a generation function has made in its place.

    Raises:
        UserError: a flag of the generation or the reward is wrong.
    """
    sample.session_id = sample.session_id or str(uuid.uuid4())
    runner = GroupRunner(Config.of(args), None, sampling_params, evaluation=evaluation)
    return _one_or_several(await runner.fill(sample))


async def generate_and_rm_group(
    args: argparse.Namespace, group: list[Sample], sampling_params: dict[str, Any], evaluation: bool = False
) -> list[Sample | list[Sample]]:
    """`generate_and_rm` for the samples of one prompt at once, graded together with --group-rm."""
    for sample in group:
        sample.session_id = sample.session_id or str(uuid.uuid4())
    runner = GroupRunner(Config.of(args), None, sampling_params, evaluation=evaluation)
    return [_one_or_several(rollout) for rollout in await runner.run_rollouts(group)]


def _one_or_several(rollout: list[Sample]) -> Sample | list[Sample]:
    return rollout[0] if len(rollout) == 1 else rollout


def generate_rollout(
    args: argparse.Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> Any:
    """What the default rollout function makes; within an event loop, a coroutine that has to be awaited for it."""
    coroutine = sglang_rollout.generate_rollout(args, rollout_id, data_source, evaluation)
    return coroutine if _running_loop() else run(coroutine)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, for rollout functions that are not coroutine functions: those run in a thread.

    The coroutine runs in the event loop of the rollout process, where `post` and rewards belong.

    Raises:
        RuntimeError: it was called in that event loop, which would then wait for itself.
    """
    if _running_loop() is client_loop():
        coroutine.close()
        raise RuntimeError("run(…) was called within the event loop: write `await …` there")
    return asyncio.run_coroutine_threadsafe(coroutine, client_loop()).result()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def async_rm(args: argparse.Namespace, sample: Sample, **kwargs: Any) -> Any:
    """The reward of a sample, from the processes that grade; in the rollout process only.

    Raises:
        RuntimeError: the reward function failed; the message has its traceback.
    """
    return _reward(await (await pool.start(Config.of(args), sample)).grade(sample))


async def batched_async_rm(args: argparse.Namespace, samples: Sequence[Sample], **kwargs: Any) -> list[Any]:
    """The rewards of several samples: with --group-rm of all together, else each by itself.

    Raises:
        RuntimeError: see `async_rm`.
    """
    if args.group_rm and samples:
        grades = await (await pool.start(Config.of(args), samples[0])).grade_group(list(samples))
        return [_reward(grade) for grade in grades]
    return await asyncio.gather(*(async_rm(args, sample) for sample in samples))


def _reward(grade: pool.Grade) -> Any:
    if grade.failure is not None:
        raise RuntimeError(f"the reward failed: {grade.failure}")
    return grade.reward


def compute_score(solution_str: str, ground_truth: str, strict_box_verify: bool = False) -> dict[str, Any]:
    """DAPO's score of a text, as `--rm-type dapo` gives it; `pred` is "[INVALID]" where there is no answer.

    Args:
        strict_box_verify: Whether only what stands in the last box is an answer.
    """
    if strict_box_verify:
        box = last_boxed(solution_str[-300:])
        solution_str = "" if box is None else f"\\boxed{{{box}}}"
    score = dapo(None, Sample(response=solution_str, label=ground_truth))
    return score | {"pred": score["pred"] or "[INVALID]"}


def call_dynamic_filter(
    function: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> DynamicFilterOutput:
    """The verdict of a filter; one that returns a bool is taken too, and without a filter every group is kept."""
    verdict = True if function is None else function(*args, **kwargs)
    return verdict if isinstance(verdict, DynamicFilterOutput) else DynamicFilterOutput(bool(verdict))


class MetricGatherer:
    """Counts the groups that a rollout function's filter drops, by reason."""

    def __init__(self) -> None:
        self._dropped: Counter[str] = Counter()

    def on_dynamic_filter_drop(self, reason: str | None) -> None:
        """Count one; without a reason none is counted."""
        if reason:
            self._dropped[reason] += 1

    def collect(self) -> dict[str, float]:
        """The counts as metrics of a rollout."""
        return {f"rollout/dynamic_filter/drop_{reason}": count for reason, count in self._dropped.items()}


class MultiTurnLossMaskGenerator:
    """Token ids and loss masks of conversations; the assistant's messages are trained on.

    `tokenizer_type` is not needed: the tokenizer's own chat template tells where its turns begin and end.
    """

    def __init__(self, tokenizer: Any, tokenizer_type: str = "qwen") -> None:
        self.tokenizer, self.tokenizer_type = tokenizer, tokenizer_type

    def get_loss_mask(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids, and 1 for each that is trained on: of assistant's messages without `step_loss_mask` 0.

        Raises:
            UserError: the tokenizer has no chat template, or one that shows a turn otherwise than its prompt.
        """
        return tokens_and_mask(messages, self.tokenizer, tools=tools)

    def get_response_lengths(self, loss_masks: list[list[int]]) -> list[int]:
        """See the function of this name."""
        return get_response_lengths(loss_masks)

    def get_text_from_loss_mask(self, token_ids: list[int], loss_masks: list[int]) -> list[str]:
        """The text of each stretch of tokens that is trained on."""
        stretches = groupby(zip(token_ids, loss_masks, strict=True), key=itemgetter(1))
        return [self.tokenizer.decode([token for token, _ in part]) for trained, part in stretches if trained]


def get_response_lengths(loss_masks: list[list[int]]) -> list[int]:
    """For each mask of a whole conversation, the tokens from the first that is trained on to the end; 0 without one."""
    return [len(mask) - mask.index(1) if 1 in mask else 0 for mask in loss_masks]


def all_gather_with_cp(tensor: Tensor, total_length: int, response_length: int) -> Tensor:
    """The tensor as it is: functions of users get whole responses, also with context parallelism."""
    return tensor


def slice_log_prob_with_cp(tensor: Tensor, total_length: int, response_length: int, *args: Any) -> Tensor:
    """The tensor as it is, see `all_gather_with_cp`."""
    return tensor
