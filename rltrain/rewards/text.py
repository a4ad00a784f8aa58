"""Rewards that compare texts, and how they find the final answer of a response.

A final answer is looked for after the thoughts, in a box, after "Answer:", or as a letter. Each reward has the
signature of a custom reward function, and does without its `args`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

from rltrain.sample import Sample

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER = re.compile(r"(?i)answer\s*:\s*([^\n]+)")
_LETTER = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\**\(?([A-Z])\)?(?![A-Za-z])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def after_thinking(response: str) -> str | None:
    """What follows `</think>`; None where thoughts began and never ended, the whole where there are none."""
    head, mark, tail = response.rpartition("</think>")
    if mark:
        return tail
    return None if "<think>" in head + tail else response


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete `\boxed{…}`, with the braces inside it matched."""
    for match in reversed(list(_BOX.finditer(text))):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[match.end() : i].strip()
    return None


def after_answer(text: str) -> str | None:
    """The line after the last "Answer:"."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None


def choice_letter(response: str, letters: str) -> str | None:
    """The letter that a response chooses: boxed, after "answer is", or the last one that stands alone."""
    text = after_thinking(response)
    if text is None:
        return None
    boxed = last_boxed(text)
    if boxed is not None:
        stripped = re.sub(r"\\text\s*\{(.*)\}", r"\1", boxed).strip("() .")
        if len(stripped) == 1 and stripped.upper() in letters:
            return stripped.upper()
    named = [letter for letter in _LETTER.findall(text) if letter in letters]
    alone = re.findall(rf"(?<![A-Za-z'])([{letters}])(?![A-Za-z'])", text)
    found = named or alone
    return found[-1] if found else None


def normalize_math(text: str) -> str:
    """A final answer without what does not change it: dollar signs, units, commas in numbers, white space."""
    text = text.split("=")[-1].strip().strip("$").strip().rstrip(".")
    text = re.sub(r"\\(?:text|mathrm|textbf)\s*\{(.*?)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|displaystyle|[,;!:])(?![A-Za-z])", "", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\%", "").replace("%", "")
    text = re.sub(r"\^\s*\{?\\circ\}?", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"\s+|\$", "", text)


def normalize_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD compares them."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return _ARTICLES.sub(" ", text).split()


def f1_of_words(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words, with repetitions (SQuAD, arXiv:1606.05250)."""
    ours, theirs = normalize_words(prediction), normalize_words(truth)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def exact_match(args: object, sample: Sample) -> float:
    """1 if the response is the label, apart from white space around both; else 0."""
    return float(sample.response.strip() == str(sample.label).strip())


def f1(args: object, sample: Sample) -> float:
    """F1 of the words of response and label."""
    return f1_of_words(sample.response, str(sample.label))


def regex(args: object, sample: Sample) -> float:
    """1 if the label, a regular expression, matches anywhere in the response."""
    return float(re.search(str(sample.label), sample.response) is not None)


def multiple_choice(args: object, sample: Sample) -> float:
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


def dapo(args: object, sample: Sample) -> dict[str, Any]:
    """DAPO's score: 1 or −1 for the answer after the last "Answer:" (or in a box) near the end of the response.

    https://arxiv.org/abs/2503.14476. A dict: train on it with `--reward-key score`; `acc` is 1 or 0.
    """
    tail = sample.response[-300:]
    answer = after_answer(tail)
    boxed = last_boxed(answer if answer is not None else tail)
    prediction = normalize_math(boxed if boxed is not None else answer or "")
    correct = bool(prediction) and prediction == normalize_math(str(sample.label))
    return {"score": 1.0 if correct else -1.0, "acc": float(correct), "pred": prediction}
