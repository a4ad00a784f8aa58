"""Rollouts that take all their prompts at their start, so that the next one can begin while they are generated."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from rltrain.arguments.extensions import DEFAULT_ROLLOUT_FUNCTION
from rltrain.sample import Sample


def takes_all_at_once(args: argparse.Namespace) -> bool:
    """Whether a rollout asks the data source for its prompts once, and gives none back.

    Only then is it known, as soon as it has them, where the next rollout goes on. Rollouts of functions of the
    user, and those that sample more than they keep, follow one another.
    """
    return (
        args.max_staleness > 0
        and args.rollout_function_path == DEFAULT_ROLLOUT_FUNCTION
        and args.over_sampling_batch_size == args.rollout_batch_size
        and not args.dynamic_sampling_filter_path
        and not args.partial_rollout
        and not args.rollout_all_samples_process_path
    )


class OneTake:
    """A data source for one rollout; as soon as it has handed out all its groups, the state after it is stored."""

    def __init__(self, source: Any, groups: int, rollout_id: int, taken: asyncio.Event) -> None:
        self._source, self._missing, self._rollout_id, self._taken = source, groups, rollout_id, taken

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        """The next groups of the data source."""
        groups = self._source.get_samples(num_samples)
        self._missing -= len(groups)
        if self._missing <= 0:
            self._source.save(self._rollout_id)
            self._taken.set()
        return groups
