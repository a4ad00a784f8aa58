"""The tasks: generators and verifiers of reasoning-gym as they are, made easy enough for a 135M model.

A model this small answers at random unless it is shown the form of the answer, so every prompt begins
with two solved questions of the same task as earlier turns of the conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import reasoning_gym

Row = dict[str, Any]

SHOTS = 2


@dataclass(frozen=True)
class Task:
    """A dataset of reasoning-gym and the options that its generator gets."""

    name: str
    options: dict[str, int]


TASKS = [
    Task("letter_counting", {"min_words": 3, "max_words": 6}),
    Task("spell_backward", {"min_word_len": 3, "max_word_len": 4}),
    Task("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
]


def make_splits(task: Task, sizes: list[int], seed: int) -> list[list[Row]]:
    """Rows of `task` in disjoint lists of `sizes`: no question is in two of them.

    Raises:
        ValueError: the generator does not have that many different questions.
    """
    wanted = SHOTS + sum(sizes)
    questions: dict[str, Row] = {}
    # Easy generators repeat themselves: ask for more than are wanted, keep each question once.
    for entry in reasoning_gym.create_dataset(task.name, seed=seed, size=20 * wanted, **task.options):
        questions.setdefault(entry["question"], entry)
        if len(questions) == wanted:
            break
    else:
        raise ValueError(f"{task.name} has only {len(questions)} different questions, {wanted} are wanted")
    entries = list(questions.values())
    shots, rest = entries[:SHOTS], entries[SHOTS:]
    splits = []
    for size in sizes:
        splits.append([make_row(task, entry, shots) for entry in rest[:size]])
        rest = rest[size:]
    return splits


def make_row(task: Task, entry: Row, shots: list[Row]) -> Row:
    """A line of the prompt file: messages, the answer, and what the verifier needs."""
    turns = [turn for shot in shots for turn in (_user(shot["question"]), _assistant(shot["answer"]))]
    return {
        "prompt": [*turns, _user(entry["question"])],
        "label": entry["answer"],
        "metadata": {"task": task.name, "entry": entry},
    }


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content.strip()}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
