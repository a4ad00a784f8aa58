"""What rollout functions return (slime's names); plain lists and dicts are taken too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.arguments.errors import UserError
from rltrain.sample import Sample


@dataclass
class RolloutFnTrainOutput:
    """A batch: groups of samples, and the function's own metrics (`rollout/` is put before bare names).

    In the place of a sample there may be a list of samples that were one rollout and share its `rollout_id`.
    """

    samples: list[list[Sample]]
    metrics: dict[str, float] | None = None


@dataclass
class RolloutFnEvalOutput:
    """One evaluation: for each set its name and `{"rewards": [...], "truncated": [...], "samples": [...]}`."""

    data: dict[str, dict[str, Any]]
    metrics: dict[str, float] | None = None


def as_train_output(output: Any, path: str, count: int | None) -> RolloutFnTrainOutput:
    """What the rollout function at `path` returned, with flat groups, having checked it.

    Raises:
        UserError: it is no batch of `count` rollouts (None: of any number) in groups.
    """
    if not isinstance(output, RolloutFnTrainOutput):
        output = RolloutFnTrainOutput(output)
    groups = output.samples
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise UserError(
            f"{path} returned {_kind(groups)}, where a list of groups, lists of samples, is wanted."
        )
    flat = [[sample for each in group for sample in _siblings(each, path)] for group in groups]
    found = count_rollouts([sample for group in flat for sample in group])
    if count is not None and found != count:
        raise UserError(
            f"{path} returned {found} samples, where --rollout-batch-size × --n-samples-per-prompt ="
            f" {count} are wanted. Samples that share a rollout_id count as one."
        )
    return RolloutFnTrainOutput(flat, output.metrics)


def count_rollouts(samples: Sequence[Sample]) -> int:
    """How many rollouts these samples are of: those that share a `rollout_id` are of one."""
    siblings = [sample.rollout_id for sample in samples if sample.rollout_id is not None]
    return len(samples) - len(siblings) + len(set(siblings))


def _siblings(each: Any, path: str) -> list[Sample]:
    """The sample, or the samples in its place."""
    samples = each if isinstance(each, list) else [each]
    stranger = next((sample for sample in samples if not isinstance(sample, Sample)), None)
    if stranger is not None:
        raise UserError(f"{path} returned a group that holds {_kind(stranger)}, where a Sample is wanted.")
    ids = {sample.rollout_id for sample in samples}
    if isinstance(each, list) and (len(ids) != 1 or None in ids):
        raise UserError(
            f"{path} returned a list of samples in the place of one whose rollout_id are"
            f" {', '.join(str(sample.rollout_id) for sample in samples)}: give all of them the same."
        )
    return samples


def as_eval_output(output: Any, path: str) -> RolloutFnEvalOutput:
    """What the evaluation function at `path` returned, having checked it.

    Raises:
        UserError: it is no dict of sets, or a set lacks rewards or samples, or has more of one than of the other.
    """
    if not isinstance(output, RolloutFnEvalOutput):
        output = RolloutFnEvalOutput(output)
    if not isinstance(output.data, dict):
        raise UserError(f"{path} returned {_kind(output.data)}, where a dict of evaluation sets is wanted.")
    for name, result in output.data.items():
        if not isinstance(result, dict) or not {"rewards", "samples"} <= result.keys():
            raise UserError(f"{path}: set {name!r} is {_kind(result)} without 'rewards' and 'samples'.")
        rewards, samples = result["rewards"], result["samples"]
        if len(rewards) != len(samples):
            raise UserError(f"{path}: set {name!r} has {len(rewards)} rewards for {len(samples)} samples.")
    return output


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
