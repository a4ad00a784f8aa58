"""What rollout functions return (slime's names); plain lists and dicts are taken too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rltrain.arguments.errors import UserError
from rltrain.sample import Sample


@dataclass
class RolloutFnTrainOutput:
    """A batch: groups of samples, and the function's own metrics (`rollout/` is put before bare names)."""

    samples: list[list[Sample]]
    metrics: dict[str, float] | None = None


@dataclass
class RolloutFnEvalOutput:
    """One evaluation: for each set its name and `{"rewards": [...], "truncated": [...], "samples": [...]}`."""

    data: dict[str, dict[str, Any]]
    metrics: dict[str, float] | None = None


def as_train_output(output: Any, path: str, count: int) -> RolloutFnTrainOutput:
    """What the rollout function at `path` returned, having checked it.

    Raises:
        UserError: it is no batch of `count` samples in groups.
    """
    if not isinstance(output, RolloutFnTrainOutput):
        output = RolloutFnTrainOutput(output)
    groups = output.samples
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise UserError(
            f"{path} returned {_kind(groups)}, where a list of groups, lists of samples, is wanted."
        )
    samples = [sample for group in groups for sample in group]
    stranger = next((sample for sample in samples if not isinstance(sample, Sample)), None)
    if stranger is not None:
        raise UserError(f"{path} returned a group that holds {_kind(stranger)}, where a Sample is wanted.")
    if len(samples) != count:
        raise UserError(
            f"{path} returned {len(samples)} samples, where --rollout-batch-size × --n-samples-per-prompt ="
            f" {count} are wanted."
        )
    return output


def as_eval_output(output: Any, path: str) -> RolloutFnEvalOutput:
    """What the evaluation function at `path` returned, having checked it.

    Raises:
        UserError: it is no dict of sets, or a set lacks rewards or samples.
    """
    if not isinstance(output, RolloutFnEvalOutput):
        output = RolloutFnEvalOutput(output)
    if not isinstance(output.data, dict):
        raise UserError(f"{path} returned {_kind(output.data)}, where a dict of evaluation sets is wanted.")
    for name, result in output.data.items():
        if not isinstance(result, dict) or not {"rewards", "samples"} <= result.keys():
            raise UserError(f"{path}: set {name!r} is {_kind(result)} without 'rewards' and 'samples'.")
    return output


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
