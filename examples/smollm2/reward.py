"""Grade a response with the verifier of the reasoning-gym task that its prompt came from."""

from __future__ import annotations

import argparse
from functools import cache
from typing import TYPE_CHECKING, Any

from reasoning_gym.factory import get_score_answer_fn

if TYPE_CHECKING:
    from collections.abc import Callable

    from rltrain.sample import Sample


async def reward(args: argparse.Namespace, sample: Sample) -> float:
    """1 for the right answer; most verifiers give a part of it where the answer stands in more text."""
    return float(verifier(sample.metadata["task"])(sample.response.strip(), sample.metadata["entry"]))


@cache
def verifier(task: str) -> Callable[[str, dict[str, Any]], float]:
    """The task's own `score_answer(answer, entry)`."""
    return get_score_answer_fn(task)
