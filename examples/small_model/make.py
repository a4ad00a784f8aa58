"""Write the small model's shape, its lessons, and the prompts of the examples that begin with it.

python -m examples.small_model.make [DIR]     (default: data/small_model)
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from examples.curriculum.curriculum import LEVELS, make_prompts
from examples.search.generate import Index
from examples.small_model import lessons
from examples.small_model.lessons import Row
from rltrain.demo.assets import model_config, tokenizer_files

CHARACTERS = "0123456789+-*=[];? abcdefghijklmnopqrstuvwxyz"
LESSONS, PROMPTS = 16_384, 512


def write_all(directory: Path) -> None:
    """Everything into `directory`; the same files each time."""
    (directory / "model").mkdir(parents=True, exist_ok=True)
    files = {**tokenizer_files(CHARACTERS), "config.json": model_config(CHARACTERS)}
    # For agents: their messages one after the other, as the model was taught.
    files["tokenizer_config.json"]["chat_template"] = (
        "{% for each in messages %}{{ each.content }}{% endfor %}"
    )
    for name, content in files.items():
        (directory / "model" / name).write_text(json.dumps(content, indent=2) + "\n")
    (directory / "documents.txt").write_text("\n".join(lessons.documents()) + "\n")
    index = Index(lessons.documents())
    teachers: list[Callable[[random.Random], Row]] = [
        lessons.product_lesson,
        lambda rng: lessons.question_lesson(rng, index),
        lessons.sum_lesson,
        lessons.chain_lesson,
    ]
    write_rows(directory / "lessons.jsonl", draw(LESSONS, lambda rng: rng.choice(teachers)(rng), "lessons"))
    for name, make in {
        "calculator": lessons.product,
        "search": lessons.question,
        "step_by_step": lessons.long_sum,
    }.items():
        write_rows(directory / f"{name}.jsonl", draw(PROMPTS, make, name))
    levels = range(len(LEVELS))
    write_rows(
        directory / "curriculum.jsonl", [row for i in levels for row in make_prompts(i, PROMPTS, seed=i)]
    )
    write_rows(
        directory / "curriculum_eval.jsonl",
        [row for i in levels for row in make_prompts(i, 50, seed=100 + i)],
    )


def draw(count: int, make: Callable[[random.Random], Row], seed: str) -> list[Row]:
    """`count` rows; the same for the same seed."""
    rng = random.Random(seed)
    return [make(rng) for _ in range(count)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write_all(Path(sys.argv[1] if len(sys.argv) > 1 else "data/small_model"))
