"""The rewards of the rollout process: one pool a reward function, found without passing it around.

Generation functions have slime's signatures, which hold no pool: hence a module-level one.
"""

from __future__ import annotations

import argparse
import asyncio

from rltrain.functions import load_function
from rltrain.rewards.pool import RewardPool
from rltrain.rewards.rules import reward_function_path
from rltrain.rewards.worker import Grade
from rltrain.sample import Sample

_pools: dict[tuple[str | None, ...], asyncio.Future[RewardPool]] = {}


async def grade(args: argparse.Namespace, sample: Sample) -> None:
    """Grade the sample in place: sets `reward`, or `status` FAILED and `failure`.

    Raises:
        UserError: no reward function was asked for, or it can't be loaded.
    """
    pool = await start(args, sample)
    _apply(sample, await pool.grade(sample))


async def grade_group(args: argparse.Namespace, samples: list[Sample]) -> None:
    """The same for the samples of one prompt together, with `--group-rm`."""
    if samples:
        pool = await start(args, samples[0])
        for sample, grade in zip(samples, await pool.grade_group(samples), strict=True):
            _apply(sample, grade)


def _apply(sample: Sample, grade: Grade) -> None:
    sample.reward, sample.reward_seconds = grade.reward, grade.seconds
    if grade.metadata is not None:
        sample.metadata = grade.metadata
    if grade.failure is not None:
        sample.status, sample.failure = Sample.Status.FAILED, grade.failure


def check(args: argparse.Namespace) -> None:
    """See that the reward that the flags ask for can be loaded.

    Raises:
        UserError: see `grade`.
    """
    load_function(reward_function_path(args), flag="--custom-rm-path")


async def start(args: argparse.Namespace, sample: Sample | None = None) -> RewardPool:
    """The running pool for the reward that the flags, or the sample's metadata, ask for; started by the first call.

    Raises:
        UserError: see `grade`.
    """
    path = reward_function_path(args, sample)
    key = (path, args.reward_key, args.rm_type)
    if key not in _pools:
        _pools[key] = asyncio.ensure_future(RewardPool.start(args, path))
    return await _pools[key]


async def close() -> None:
    """End all pools."""
    while _pools:
        _, pool = _pools.popitem()
        await (await pool).close()
