"""How old the weights are that a sample was generated with, and what becomes of samples that are too old."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from rltrain.sample import Sample, age


def largest_age(args: argparse.Namespace) -> float:
    """The age up to which samples are trained on; without --max-staleness nothing is too old."""
    if not args.max_staleness:
        return math.inf
    # Between two pushes the trainer goes on with what the engines have.
    return max(args.max_staleness, args.update_weights_interval - 1)


def age_metrics(rollout_id: int, samples: Sequence[Sample]) -> dict[str, float]:
    """`rollout/staleness_mean` over all generated tokens and `rollout/staleness_max`, as far as recorded."""
    total = count = 0.0
    largest = -math.inf
    for sample in samples:
        for span in sample.weight_version_spans:
            oldest = age(rollout_id, [span["version"]])
            if oldest is not None and math.isfinite(oldest):
                tokens = span["end"] - span["start"]
                total, count = total + oldest * tokens, count + tokens
                largest = max(largest, oldest)
    if not count:
        return {}
    return {"rollout/staleness_mean": total / count, "rollout/staleness_max": largest}


class StalenessGuard:
    """Sees to it that no sample of a rollout is too old, and counts."""

    def __init__(self, rollout_id: int, largest: float) -> None:
        """Guard rollout `rollout_id` against samples of an age above `largest`, see `largest_age`."""
        self._rollout_id, self._largest = rollout_id, largest
        self.watches = math.isfinite(largest)
        self.regenerated = self.dropped = 0

    def begin_anew(self, sample: Sample) -> None:
        """Take the response off a sample that is too old to be gone on with."""
        if self.any_too_old([sample]):
            self.regenerated += 1
            reset_response(sample)

    def any_too_old(self, samples: Sequence[Sample]) -> bool:
        """Whether one of them is."""
        return self.watches and any(self._too_old(sample) for sample in samples)

    def drop(self, samples: Sequence[Sample]) -> None:
        """Fail those that are too old."""
        for sample in samples if self.watches else ():
            if self._too_old(sample):
                self.dropped += 1
                versions = ", ".join(sample.weight_versions)
                reset_response(sample)
                sample.status = Sample.Status.FAILED
                sample.failure = (
                    f"generated with weights of version {versions}, older than --max-staleness allows in"
                    f" rollout {self._rollout_id}"
                )

    def metrics(self) -> dict[str, float]:
        """How many samples were begun anew and how many dropped; {} without --max-staleness."""
        if not self.watches:
            return {}
        return {
            "rollout/staleness_regenerated": float(self.regenerated),
            "rollout/staleness_dropped": float(self.dropped),
        }

    def _too_old(self, sample: Sample) -> bool:
        oldest = age(self._rollout_id, sample.weight_versions)
        return oldest is not None and oldest > self._largest


def reset_response(sample: Sample) -> None:
    """Leave of the sample only its prompt."""
    sample.tokens = sample.tokens[: sample.prompt_length]
    sample.response, sample.response_length = "", 0
    sample.loss_mask = sample.rollout_log_probs = sample.reward = None
    sample.weight_versions, sample.weight_version_spans = [], []
    sample.metadata.pop("start_rollout_id", None)
    sample.status = Sample.Status.PENDING
