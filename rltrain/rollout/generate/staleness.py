"""Staleness: the age of the weights that wrote a sample; what happens to samples and tokens that are too old."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile

from rltrain.arguments.groups.rollout import Rollout
from rltrain.arguments.groups.weights import Weights
from rltrain.sample import Sample, age


def largest_age(rollout: Rollout, weights: Weights) -> float:
    """The age up to which samples are trained on; without --max-staleness nothing is too old."""
    if not rollout.max_staleness:
        return math.inf
    # Between two pushes the trainer continues with the engines' weights.
    return max(rollout.max_staleness, weights.update_weights_interval - 1)


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
    """Keeps samples that are too old out of a rollout, and counts them."""

    def __init__(self, rollout_id: int, largest: float) -> None:
        """Guard rollout `rollout_id` against samples of an age above `largest`, see `largest_age`."""
        self._rollout_id, self._largest = rollout_id, largest
        self.watches = math.isfinite(largest)
        self.regenerated = self.dropped = 0

    def begin_anew(self, sample: Sample) -> None:
        """Take the response off a sample that is too old to be continued, or to be trained on as it is."""
        if self.any_too_old([sample]):
            self.regenerated += 1
            reset_response(sample)

    def any_too_old(self, samples: Sequence[Sample]) -> bool:
        """Whether one of the samples is too old."""
        return self.watches and any(self._too_old(sample) for sample in samples)

    def drop(self, samples: Sequence[Sample]) -> None:
        """Fail the samples that are too old."""
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
        """How many samples were begun again and how many dropped; {} without --max-staleness."""
        if not self.watches:
            return {}
        return {
            "rollout/staleness_regenerated": float(self.regenerated),
            "rollout/staleness_dropped": float(self.dropped),
        }

    def _too_old(self, sample: Sample) -> bool:
        oldest = age(self._rollout_id, sample.weight_versions)
        return oldest is not None and oldest > self._largest


def mask_earlier(samples: Sequence[Sample], earlier: Sequence[int]) -> None:
    """Take what an earlier rollout had written out of the loss.

    Args:
        samples: What a rollout became of the sample.
        earlier: Tokens of the prompt and response with which that sample came into this rollout. A sample that has
            only the first of them keeps these masked.
    """
    for sample in samples:
        shared = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(sample.tokens, earlier, strict=False))
        )
        old = min(shared - sample.prompt_length, sample.response_length)
        if old > 0:
            mask = [1] * sample.response_length if sample.loss_mask is None else sample.loss_mask
            sample.loss_mask = [0] * old + list(mask[old:])


def reset_response(sample: Sample) -> None:
    """Leave only the prompt of the sample."""
    sample.tokens = sample.tokens[: sample.prompt_length]
    sample.response, sample.response_length = "", 0
    sample.loss_mask = sample.rollout_log_probs = sample.reward = None
    sample.weight_versions, sample.weight_version_spans = [], []
    sample.rollout_routed_experts = None
    sample.spec_info, sample.prefix_cache_info = Sample.SpecInfo(), Sample.PrefixCacheInfo()
    sample.metadata.pop("start_rollout_id", None)
    sample.status = Sample.Status.PENDING
