"""Rewards that compare texts. Each has the signature of a custom reward function."""

from __future__ import annotations

import argparse
import re
import string
from typing import Any

from rltrain.rewards.answers import after_answer, choice_letter, f1_of_words, last_boxed, normalize_math
from rltrain.sample import Sample


def exact_match(args: argparse.Namespace, sample: Sample) -> float:
    """1 if the response is the label, apart from white space around both; else 0."""
    return float(sample.response.strip() == str(sample.label).strip())


def f1(args: argparse.Namespace, sample: Sample) -> float:
    """F1 of the words of response and label."""
    return f1_of_words(sample.response, str(sample.label))


def regex(args: argparse.Namespace, sample: Sample) -> float:
    """1 if the label, a regular expression, matches anywhere in the response."""
    return float(re.search(str(sample.label), sample.response) is not None)


def multiple_choice(args: argparse.Namespace, sample: Sample) -> float:
    """1 if the response chooses the right letter: the label, or the letter of the choice that is the label.

    Metadata: `choices` (texts, in order), `correct_letter`, `valid_letters`; all optional.
    """
    choices = sample.metadata.get("choices") or []
    letters = "".join(sample.metadata.get("valid_letters") or string.ascii_uppercase[: len(choices) or 8])
    correct = str(sample.metadata.get("correct_letter") or sample.label).strip()
    if correct.upper() not in letters or len(correct) != 1:
        if correct not in choices:
            raise ValueError(
                f"the label {correct!r} is neither one of the letters {letters} nor one of the choices"
            )
        correct = letters[choices.index(correct)]
    return float(choice_letter(sample.response, letters) == correct.upper())


def dapo(args: argparse.Namespace, sample: Sample) -> dict[str, Any]:
    """DAPO's score: 1 or −1 for the answer after the last "Answer:" (or in a box) near the end of the response.

    https://arxiv.org/abs/2503.14476. A dict: train on it with `--reward-key score`; `acc` is 1 or 0.
    """
    tail = sample.response[-300:]
    answer = after_answer(tail)
    boxed = last_boxed(answer if answer is not None else tail)
    prediction = normalize_math(boxed if boxed is not None else answer or "")
    correct = bool(prediction) and prediction == normalize_math(str(sample.label))
    return {"score": 1.0 if correct else -1.0, "acc": float(correct), "pred": prediction}
