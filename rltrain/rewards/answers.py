"""Finding the final answer in a response: after the thoughts, in a box, after "Answer:", or as a letter. Pure."""

from __future__ import annotations

import re
import string
from collections import Counter

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
