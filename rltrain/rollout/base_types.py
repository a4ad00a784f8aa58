"""What rollout functions return (slime's names); plain lists and dicts are taken too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
