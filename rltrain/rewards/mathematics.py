"""Rewards for answers that are mathematics, compared as such by math-verify (symbolically, and numerically)."""

from __future__ import annotations

from math_verify import parse, verify

from rltrain.rewards.text import after_thinking, last_boxed, normalize_math
from rltrain.sample import Sample


def equal(answer: str, truth: str) -> bool:
    """Whether two answers, in LaTeX or as plain text, are the same mathematics.

    Time limits are left to the reward process, which is killed when it takes too long.
    """
    if normalize_math(answer) == normalize_math(truth) != "":
        return True
    gold = _parse(truth)
    return bool(gold) and verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None)


def math(args: object, sample: Sample) -> float:
    """1 if the answer that math-verify finds in the response (a box first of all) equals the label, else 0."""
    boxed = last_boxed(sample.response)
    return float(equal(sample.response if boxed is None else f"\\boxed{{{boxed}}}", str(sample.label)))


def deepscaler(args: object, sample: Sample) -> float:
    """1 if the box after the thoughts equals the label, else 0; without a box, or with thoughts that never end, 0."""
    answer = after_thinking(sample.response)
    boxed = None if answer is None else last_boxed(answer)
    return float(boxed is not None and equal(f"\\boxed{{{boxed}}}", str(sample.label)))


def _parse(truth: str) -> list[object]:
    truth = truth.strip()
    if "\\boxed" in truth or "$" in truth:
        return parse(truth, parsing_timeout=None)
    return parse(f"\\boxed{{{truth}}}", parsing_timeout=None)
