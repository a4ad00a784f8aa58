"""The demo's task: add two numbers below 100, step by step. Pure functions and the reward.

A response spells out its steps, as in `27+35=` → `7+5=12,2+3+1=6,62`. The teacher whose responses the model
is first fine-tuned on forgets the carry most of the time. So the model starts out able to add, but wrong on
most problems that carry; the reward alone, which looks only at the result, has to teach it to carry.
"""

from __future__ import annotations

import random

from rltrain.sample import Sample

FORGETS = 0.7  # share of the carries that the teacher forgets
CARRY_SHARE = 0.7  # share of the problems that need a carry
CHARACTERS = "0123456789+=,"

Problem = tuple[int, int]


def make_problems(count: int, seed: int) -> list[Problem]:
    """`count` different problems in random order; `CARRY_SHARE` of them carry."""
    rng = random.Random(seed)
    everything = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(everything)
    carrying = [problem for problem in everything if carries(problem)]
    plain = [problem for problem in everything if not carries(problem)]
    number = round(count * CARRY_SHARE)
    problems = carrying[:number] + plain[: count - number]
    rng.shuffle(problems)
    return problems


def carries(problem: Problem) -> bool:
    """Whether the units add up to ten or more."""
    return problem[0] % 10 + problem[1] % 10 >= 10


def question(problem: Problem) -> str:
    """The prompt."""
    return f"{problem[0]}+{problem[1]}="


def answer(problem: Problem) -> str:
    """The right result."""
    return str(sum(problem))


def solution(problem: Problem, *, forget_carry: bool) -> str:
    """The steps and the result; without the carry, the result is ten too small."""
    (tens_a, units_a), (tens_b, units_b) = divmod(problem[0], 10), divmod(problem[1], 10)
    carry, unit = divmod(units_a + units_b, 10)
    if forget_carry:
        carry = 0
    tens = tens_a + tens_b + carry
    steps = f"{units_a}+{units_b}={units_a + units_b},{tens_a}+{tens_b}" + (f"+{carry}" if carry else "")
    return f"{steps}={tens},{tens * 10 + unit}"


def teacher(problem: Problem, rng: random.Random) -> str:
    """The careless teacher's response."""
    return solution(problem, forget_carry=rng.random() < FORGETS)


async def reward(args: object, sample: Sample) -> float:
    """1 if the response ended by itself and its last number is the label, else 0."""
    finished = sample.status is Sample.Status.COMPLETED
    return float(finished and sample.response.split(",")[-1] == sample.label)
