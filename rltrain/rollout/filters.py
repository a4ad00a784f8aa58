"""Filters for `--dynamic-sampling-filter-path` and `--rollout-sample-filter-path`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from rltrain.sample import Sample


@dataclass(frozen=True)
class DynamicFilterOutput:
    """Whether a group is kept, and why not; groups that are dropped are counted by reason."""

    keep: bool
    reason: str | None = None


def check_reward_nonzero_std(
    args: argparse.Namespace, samples: list[Sample], **kwargs: Any
) -> DynamicFilterOutput:
    """Keep groups whose rewards differ: from the others a group's baseline learns nothing.

    DAPO's dynamic sampling (https://arxiv.org/abs/2503.14476, section 3.2).
    """
    rewards = [sample.get_reward_value(args) for sample in samples if sample.reward is not None]
    if len(rewards) < 2:
        return DynamicFilterOutput(False, "failed")
    if min(rewards) == max(rewards):
        return DynamicFilterOutput(False, f"zero_std_{rewards[0]:.1f}")
    return DynamicFilterOutput(True)


def remove_truncated(args: argparse.Namespace, groups: list[list[Sample]]) -> None:
    """Do not train on responses that a length limit cut off: DAPO's overlong filtering, section 3.4."""
    for group in groups:
        for sample in group:
            if sample.status is Sample.Status.TRUNCATED:
                sample.remove_sample = True
