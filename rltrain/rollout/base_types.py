"""What rollout functions return (slime's names); plain lists and dicts are taken too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.run.errors import UserError
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
    """Check what the rollout function at `path` returned; its groups are flat in the result.

    Raises:
        UserError: it is not a batch of `count` rollouts (None: of any number) in groups.
    """
    if not isinstance(output, RolloutFnTrainOutput):
        output = RolloutFnTrainOutput(output)
    groups = output.samples
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise UserError(
            f"{path} returned {_kind(groups)}; expected a list of groups, each a list of samples."
        )
    flat = [[sample for each in group for sample in _siblings(each, path)] for group in groups]
    found = count_rollouts([sample for group in flat for sample in group])
    if count is not None and found != count:
        raise UserError(
            f"{path} returned {found} samples; expected --rollout-batch-size × --n-samples-per-prompt ="
            f" {count}. Samples that share a rollout_id count as one."
        )
    return RolloutFnTrainOutput(flat, output.metrics)


def count_rollouts(samples: Sequence[Sample]) -> int:
    """Number of rollouts that these samples come from: samples that share a `rollout_id` come from one."""
    siblings = [sample.rollout_id for sample in samples if sample.rollout_id is not None]
    return len(samples) - len(siblings) + len(set(siblings))


def _siblings(each: Any, path: str) -> list[Sample]:
    """The sample, or the samples in its place."""
    samples = each if isinstance(each, list) else [each]
    stranger = next((sample for sample in samples if not isinstance(sample, Sample)), None)
    if stranger is not None:
        raise UserError(f"{path} returned a group that holds {_kind(stranger)}; expected a Sample.")
    ids = {sample.rollout_id for sample in samples}
    if isinstance(each, list) and (len(ids) != 1 or None in ids):
        raise UserError(
            f"{path} returned, in place of one sample, a list whose rollout_id are"
            f" {', '.join(str(sample.rollout_id) for sample in samples)}: give all of them the same."
        )
    return samples


def as_eval_output(output: Any, path: str) -> RolloutFnEvalOutput:
    """Check what the evaluation function at `path` returned.

    Raises:
        UserError: it is not a dict of sets, or a set lacks rewards or samples, or their numbers differ.
    """
    if not isinstance(output, RolloutFnEvalOutput):
        output = RolloutFnEvalOutput(output)
    if not isinstance(output.data, dict):
        raise UserError(f"{path} returned {_kind(output.data)}; expected a dict of evaluation sets.")
    for name, result in output.data.items():
        if not isinstance(result, dict) or not {"rewards", "samples"} <= result.keys():
            raise UserError(f"{path}: set {name!r} is {_kind(result)} without 'rewards' and 'samples'.")
        rewards, samples = result["rewards"], result["samples"]
        if len(rewards) != len(samples):
            raise UserError(f"{path}: set {name!r} has {len(rewards)} rewards for {len(samples)} samples.")
    return output


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
