"""Length shaping of rewards, for `--custom-reward-post-process-path`."""

from __future__ import annotations

import argparse

from rltrain.arguments.config import group_of
from rltrain.arguments.groups.algorithm import Algorithm
from rltrain.arguments.groups.rollout import Rewards
from rltrain.rollout.train_data.convert import graded_reward, train_rewards
from rltrain.sample import Sample


def overlong(args: argparse.Namespace, samples: list[Sample]) -> tuple[list[float | None], list[float]]:
    """Take off a penalty that grows over the last tokens before the limit, then normalise as the estimator does.

    DAPO's soft overlong punishment (https://arxiv.org/abs/2503.14476, eq. 13). From `--custom-config-path`:
    `overlong_buffer_len` (tokens before --rollout-max-response-len; default a fifth of it) and
    `overlong_penalty_factor` (the penalty at the limit; default 1).
    """
    limit = args.rollout_max_response_len
    buffer = getattr(args, "overlong_buffer_len", max(1, limit // 5))
    factor = getattr(args, "overlong_penalty_factor", 1.0)
    rewards = group_of(args, Rewards)
    raw = [graded_reward(rewards, sample) for sample in samples]
    shaped = [
        None if reward is None else reward + overlong_penalty(sample.response_length, limit, buffer, factor)
        for reward, sample in zip(raw, samples, strict=True)
    ]
    return raw, train_rewards(group_of(args, Algorithm), samples, shaped)


def overlong_penalty(length: int, limit: int, buffer: int, factor: float) -> float:
    """0 up to limit − buffer tokens, then down to −factor at the limit, and no further."""
    return -factor * min(1.0, max(0.0, (length - (limit - buffer)) / buffer))
