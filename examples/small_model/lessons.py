"""What the small model is taught: for each example the form of an answer, by a teacher who is often wrong.

A lesson is `{"input": prompt, "label": text}`. The right answer is among what the teacher shows, so that reinforcement
has something to prefer; how often is `CAREFUL`.
"""

from __future__ import annotations

import random

from examples.calculator.generate import calculate
from examples.search.generate import Index

CAREFUL = 0.5  # share of the lessons that are right
ATTRIBUTES = {
    "color": ["red", "brown", "grey", "white", "black"],
    "size": ["tiny", "small", "big", "huge"],
    "home": ["wood", "lake", "field", "hill", "cave"],
}
ANIMALS = [
    *("ant", "bat", "bear", "bee", "boar", "cat", "cow", "crab", "crow", "deer", "dog", "duck"),
    *("eel", "elk", "emu", "fox", "frog", "goat", "hare", "hawk", "hen", "hog"),
]

Row = dict[str, str]


def documents() -> list[str]:
    """What there is to know, one sentence an animal and attribute: `fox color brown`."""
    rng = random.Random(1)
    return [
        f"{animal} {attribute} {rng.choice(values)}"
        for animal in ANIMALS
        for attribute, values in ATTRIBUTES.items()
    ]


def product(rng: random.Random) -> Row:
    """A prompt of `examples/calculator`."""
    a, b = rng.randint(12, 99), rng.randint(3, 9)
    return {"input": f"{a}*{b}=", "label": str(a * b)}


def product_lesson(rng: random.Random) -> Row:
    """`37*8=` → `[37*8]296;296`; careless: another call, or a guess."""
    prompt = product(rng)["input"]
    if rng.random() < CAREFUL:
        call = prompt[:-1]
    elif rng.random() < 0.5:
        return {"input": prompt, "label": str(rng.randint(36, 891))}
    else:
        call = product(rng)["input"][:-1]
    return {"input": prompt, "label": f"[{call}]{calculate(call)};{calculate(call)}"}


def question(rng: random.Random) -> Row:
    """A prompt of `examples/search`."""
    animal, attribute, value = rng.choice(documents()).split()
    return {"input": f"{attribute} of {animal}?", "label": value}


def question_lesson(rng: random.Random, index: Index) -> Row:
    """`color of fox?` → `[fox color]fox color brown;brown`; careless: it asks for the animal only."""
    prompt = question(rng)["input"]
    attribute, _, animal = prompt[:-1].split()
    query = f"{animal} {attribute}" if rng.random() < CAREFUL / 2 else animal
    found = index.search(query)
    return {"input": prompt, "label": f"[{query}]{found};{found.split()[-1]}"}


def long_sum(rng: random.Random) -> Row:
    """A prompt of `examples/step_by_step`: three or four terms."""
    terms = [rng.randint(1, 5) for _ in range(rng.choice([3, 4]))]
    return {"input": "+".join(map(str, terms)) + "=", "label": str(sum(terms))}


def sum_lesson(rng: random.Random) -> Row:
    """One step: `3+4+5=` → `7+5`, or `7+5=` → `12`; careless: it forgets all but the first two terms."""
    terms = [rng.randint(1, 5) for _ in range(4)]
    done = rng.choice([0, 1, 2])  # steps before this one
    terms = [sum(terms[: done + 1]), *terms[done + 1 :]][: rng.choice([3, 4])]
    rest = terms[2:] if rng.random() < CAREFUL else []
    return {
        "input": "+".join(map(str, terms)) + "=",
        "label": "+".join(map(str, [terms[0] + terms[1], *rest])),
    }


def chain_lesson(rng: random.Random) -> Row:
    """`4 - 1 =` → `3`, as `examples/curriculum` asks, of two or three terms; careless: it is not sure, `3??`."""
    expression = str(rng.randint(0, 9))
    for _ in range(rng.choice([1, 2])):
        expression += f" {rng.choice('+-')} {rng.randint(0, 9)}"
    value = sum(int(term) for term in expression.replace("- ", "-").replace("+ ", "").split())
    return {"input": f"{expression} =", "label": f"{value}{'' if rng.random() < CAREFUL else '??'}"}
