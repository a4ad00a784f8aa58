"""The texts of the runs of `analysis.demo_data`: a small tokenizer, and conversations about sums."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

# Looks like markup on purpose: the demo shows that a model's text is never treated as markup.
HOSTILE = " <script>alert('x')</script> <img src=x onerror=alert(1)> \u202ereversed\u202c \x1b[31mred\x1b[0m"

_PIECE = re.compile(r"<\|[a-z]+\|>| ?[A-Za-z]+|\d|\s|[^\w\s]|.", re.DOTALL)
_SPECIAL = ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
_TEXT = (
    "What is the sum of and plus makes equals so So answer we first add Add numbers ones then tens carry result call "
    "calculator Let me think step by again wait check that once more script alert img src onerror reversed red"
)
_WORDS = _TEXT.split()
_CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n", "\u202e", "\u202c", "\x1b"]
VOCABULARY = list(dict.fromkeys([*_SPECIAL, *_CHARACTERS, *_WORDS, *(" " + word for word in _WORDS)]))
_IDS = {token: number for number, token in enumerate(VOCABULARY)}


@dataclass
class Reply:
    """A response as pieces of text; `trained` says which the model wrote itself."""

    pieces: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole response."""
        return "".join(text for text, _ in self.pieces)


def encode(text: str) -> list[int]:
    """Token ids of `text`; a word that the vocabulary lacks is spelt out."""
    pieces = [[piece] if piece in _IDS else list(piece) for piece in _PIECE.findall(text)]
    return [_IDS.get(token, _IDS["<unk>"]) for piece in pieces for token in piece]


def write_tokenizer(directory: Path) -> None:
    """A `tokenizer.json` in the format of Hugging Face's tokenizers."""
    added = [
        {"id": _IDS[token], "content": token, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for token in _SPECIAL
    ]  # fmt: skip
    model = {"type": "WordLevel", "vocab": _IDS, "unk_token": "<unk>"}
    content = {"version": "1.0", "added_tokens": added, "model": model, "decoder": {"type": "Fuse"}}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))


def question(rng: random.Random, difficulty: int) -> tuple[str, int]:
    """A sum of two numbers of `difficulty` digits, and its result."""
    left, right = (rng.randrange(10 ** (difficulty - 1), 10**difficulty) for _ in range(2))
    return f"What is {left} plus {right}?", left + right


def direct_reply(answer: int, filler: int) -> Reply:
    """The answer after `filler` sentences that say nothing."""
    think = " Let me think again." * filler
    return Reply([(f"{think} So the answer is {answer}".lstrip(), True)])


def tool_reply(question_text: str, result: int, answer: int) -> Reply:
    """The model calls a calculator, reads what it says (which is not trained on), and answers."""
    expression = " plus ".join(re.findall(r"\d+", question_text))
    return Reply(
        [
            (f"Let me call the calculator: {expression}<|end|>", True),
            (f"<|tool|>{expression} equals {result}<|end|><|assistant|>", False),
            (f"So the answer is {answer}", True),
        ]
    )
