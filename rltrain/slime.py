"""The names that functions written for slime import: change these lines to `from rltrain.slime import …`.

docs/from_slime.md says which of slime's modules each name comes from, and what is missing.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rltrain import functions
from rltrain.arguments.config import Config
from rltrain.data.source import RolloutDataSource
from rltrain.data.tokenizer import load_tokenizer
from rltrain.rewards import pool
from rltrain.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from rltrain.rollout.filters import DynamicFilterOutput, check_reward_nonzero_std
from rltrain.rollout.generate.http import get, post
from rltrain.rollout.sglang_rollout import GenerateState, generate, generate_rollout, get_model_url
from rltrain.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DynamicFilterOutput",
    "GenerateState",
    "RolloutDataSource",
    "RolloutFnEvalOutput",
    "RolloutFnTrainOutput",
    "Sample",
    "all_gather_with_cp",
    "async_rm",
    "batched_async_rm",
    "call_dynamic_filter",
    "check_reward_nonzero_std",
    "generate",
    "generate_rollout",
    "get",
    "get_model_url",
    "load_function",
    "load_tokenizer",
    "post",
    "slice_log_prob_with_cp",
]


def load_function(path: str) -> Callable[..., Any]:
    """Import the function that `path` names.

    Raises:
        UserError: there is none.
    """
    return functions.load_function(path, flag="load_function")


async def async_rm(args: argparse.Namespace, sample: Sample, **kwargs: Any) -> Any:
    """The reward of a sample, from the processes that grade; in the rollout process only.

    Raises:
        RuntimeError: the reward function failed; the message has its traceback.
    """
    grade = await (await pool.start(Config.of(args), sample)).grade(sample)
    if grade.failure is not None:
        raise RuntimeError(f"the reward failed: {grade.failure}")
    return grade.reward


async def batched_async_rm(args: argparse.Namespace, samples: Sequence[Sample], **kwargs: Any) -> list[Any]:
    """The rewards of several samples, each by itself."""
    return await asyncio.gather(*(async_rm(args, sample) for sample in samples))


def call_dynamic_filter(
    function: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> DynamicFilterOutput:
    """The verdict of a filter; one that returns a bool is taken too, and without a filter every group is kept."""
    verdict = True if function is None else function(*args, **kwargs)
    return verdict if isinstance(verdict, DynamicFilterOutput) else DynamicFilterOutput(bool(verdict))


def all_gather_with_cp(tensor: Tensor, total_length: int, response_length: int) -> Tensor:
    """The tensor as it is: functions of users get whole responses, also with context parallelism."""
    return tensor


def slice_log_prob_with_cp(tensor: Tensor, total_length: int, response_length: int, *args: Any) -> Tensor:
    """The tensor as it is, see `all_gather_with_cp`."""
    return tensor
