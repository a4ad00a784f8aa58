"""Filters for `--dynamic-sampling-filter-path` and `--rollout-sample-filter-path`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from rltrain.sample import Sample


@dataclass
class DynamicFilterOutput:
    """Whether a group is kept, and why not; groups that are dropped are counted by reason.

    `keep_when_insufficient`: keep it all the same where its wave of prompts would else give too few groups, rather than
    sample another wave.
    """

    keep: bool
    reason: str | None = None
    keep_when_insufficient: bool = False


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


def check_reward_nonzero_std_with_fallback(
    args: argparse.Namespace, samples: list[Sample], **kwargs: Any
) -> DynamicFilterOutput:
    """The same, but as many of the others as are missing from a batch are kept: no second wave is sampled."""
    verdict = check_reward_nonzero_std(args, samples, **kwargs)
    return replace(verdict, keep_when_insufficient=verdict.reason != "failed")


def remove_truncated(args: object, groups: list[list[Sample]]) -> None:
    """Do not train on responses that a length limit cut off: DAPO's overlong filtering, section 3.4."""
    for group in groups:
        for sample in group:
            if sample.status is Sample.Status.TRUNCATED:
                sample.remove_sample = True
