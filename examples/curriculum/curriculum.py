"""A curriculum of reasoning-gym's problems: the next level is opened as soon as the present ones are solved."""

from __future__ import annotations

import argparse
from typing import Any

import reasoning_gym

from rltrain.data.source import RolloutDataSource
from rltrain.sample import Sample

LEVELS: list[dict[str, int]] = [
    {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
]
SOLVED = 0.65  # mean reward of a batch that opens the next level


class Curriculum(RolloutDataSource):
    """`--data-source-path`: prompts of the open levels only. `metadata` is stored with the place in the data."""

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        """Groups of the open levels; prompts of the others wait for the next epoch."""
        groups: list[list[Sample]] = []
        while len(groups) < num_samples:
            drawn = super().get_samples(num_samples - len(groups))
            groups += [
                group for group in drawn if group[0].metadata["level"] <= self.metadata.get("level", 0)
            ]
        return groups


def raise_level(args: argparse.Namespace, groups: list[list[Sample]], data_source: Curriculum) -> None:
    """`--rollout-all-samples-process-path`: open the next level if this batch was solved."""
    rewards = [float(sample.reward or 0.0) for group in groups for sample in group]
    level = data_source.metadata.get("level", 0)
    if sum(rewards) / len(rewards) >= SOLVED and level + 1 < len(LEVELS):
        data_source.metadata["level"] = level + 1
        print(f"curriculum: level {level + 1} from now on", flush=True)


def make_prompts(level: int, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a prompt file; reasoning-gym's own verifier grades them, `--rm-type reasoning_gym`."""
    problems = reasoning_gym.create_dataset("chain_sum", size=count, seed=seed, **LEVELS[level])
    return [
        {
            "input": f"{problem['metadata']['expression']} =",
            "label": problem["answer"],
            "metadata": {"level": level, "source_dataset": "chain_sum"},
        }
        for problem in problems
    ]
