"""Recorded rollouts in place of generated ones: `--load-debug-rollout-data`.

Rewards are post-processed and normalised again, so another estimator can be tried on the same samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rltrain.rollout.base_types import RolloutFnTrainOutput
from rltrain.run.errors import UserError
from rltrain.sample import Sample
from rltrain.schema import table_to_samples


class NoPrompts:
    """The data source of a job that generates nothing."""

    def __init__(self, args: object) -> None:
        """There is nothing to read."""

    def save(self, rollout_id: int) -> None:
        """Nothing to store."""

    def load(self, rollout_id: int | None = None) -> None:
        """Nothing to continue."""


def generate_rollout(
    args: argparse.Namespace, rollout_id: int, data_source: NoPrompts, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """The recorded groups; `--load-debug-rollout-data-subsample` takes the first part of them.

    Raises:
        UserError: there is no such file, or it does not hold a recorded rollout.
    """
    groups = read_groups(Path(args.load_debug_rollout_data.format(rollout_id=rollout_id)))
    share = args.load_debug_rollout_data_subsample
    return RolloutFnTrainOutput(groups if share is None else groups[: max(1, round(share * len(groups)))])


def read_groups(path: Path) -> list[list[Sample]]:
    """The groups of a Parquet file of samples.

    Raises:
        UserError: it can't be read.
    """
    try:
        samples = table_to_samples(pq.read_table(path, partitioning=None))
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"--load-debug-rollout-data: {path} holds no recorded rollout ({error}).") from None
    groups: dict[int | None, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_index, []).append(sample)
    return list(groups.values())
