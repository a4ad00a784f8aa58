"""The verifiers of reasoning-gym."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from reasoning_gym.factory import get_score_answer_fn
from reasoning_gym.utils import extract_answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rltrain.sample import Sample


def reasoning_gym(args: object, sample: Sample) -> float:
    """The score of the task's own verifier, 0 to 1, for what stands in `<answer>` tags, or else for all of it.

    The metadata is the entry's own (`source_dataset` and what the verifier needs), or has the whole `entry`.
    """
    entry = sample.metadata.get("entry") or {"answer": sample.label, "metadata": sample.metadata}
    task = sample.metadata.get("task") or entry["metadata"]["source_dataset"]
    answer = extract_answer(sample.response)
    return float(_verifier(task)(sample.response.strip() if answer is None else answer, entry))


@cache
def _verifier(task: str) -> Callable[[str, dict[str, Any]], float]:
    return get_score_answer_fn(task)
