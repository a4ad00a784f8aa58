"""What a sample is trained on: its reward, compared with its group as the estimator asks for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rltrain.algorithms.grpo import leave_one_out, normalize_rewards
from rltrain.sample import Sample


def train_rewards(
    args: argparse.Namespace, samples: Sequence[Sample], rewards: Sequence[float | None]
) -> list[float]:
    """One number a sample; 0 for a sample without reward, which its group's statistics leave out too.

    GRPO, GSPO and CISPO subtract the group's mean and divide by its standard deviation; RLOO subtracts the mean
    of the others; REINFORCE++-baseline subtracts the mean. REINFORCE++ and PPO have no groups: rewards stay as
    they are. A rollout of several samples counts once in its group.
    """
    groups = [sample.group_index for sample in samples]
    rollouts = [i if sample.rollout_key is None else sample.rollout_key for i, sample in enumerate(samples)]
    values = [0.0 if reward is None else float(reward) for reward in rewards]
    graded = [reward is not None for reward in rewards]
    match args.advantage_estimator if args.rewards_normalization else "reinforce_plus_plus":
        case "reinforce_plus_plus" | "ppo":
            return values
        case "rloo":
            return leave_one_out(values, groups, mask=graded, rollout_ids=rollouts)
        case "reinforce_plus_plus_baseline":
            return normalize_rewards(values, groups, std=False, mask=graded, rollout_ids=rollouts)
    std = args.grpo_std_normalization
    return normalize_rewards(values, groups, std=std, mask=graded, rollout_ids=rollouts)
