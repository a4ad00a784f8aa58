"""Slurm's way to write many host names in one word: `node[1-3,07],login1`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable

_MAX_NODES = 100_000  # a bound on what a hostile or broken list can make of this process
_NUMBERED = re.compile(r"(.*?)([0-9]+)", re.DOTALL)
_NO_NUMBER = -1


def expand(nodelist: str) -> list[str]:
    """Host names of a node list, in its order. Several brackets in one name are multiplied out.

    >>> expand("rack[1-2]n[08-10],gpu7")[:4]
    ['rack1n08', 'rack1n09', 'rack1n10', 'rack2n08']

    Raises:
        ValueError: the text is not a node list.
    """
    names: list[str] = []
    if nodelist.strip() in ("", "(null)", "None", "None assigned", "n/a", "N/A"):
        return names
    for word in _split(nodelist):
        alternatives = _alternatives(word)
        if len(names) + math.prod(map(len, alternatives)) > _MAX_NODES:
            raise ValueError(f"more than {_MAX_NODES} nodes in {nodelist[:80]!r}")
        names += ("".join(parts) for parts in itertools.product(*alternatives))
    return names


def compress(names: Iterable[str]) -> str:
    """The node list of some host names: without repetitions, each prefix's numbers in order.

    >>> compress(["node3", "node1", "node2", "login"])
    'node[1-3],login'
    """
    unique = [_numbered(name) for name in dict.fromkeys(names)]
    # Numbers that are filled up with zeros share brackets only with those of the same width.
    padded = {(prefix, len(digits)) for prefix, digits in unique if len(digits) > 1 and digits[0] == "0"}
    groups: dict[tuple[str, int], list[int]] = {}
    for prefix, digits in unique:
        width = len(digits) if (prefix, len(digits)) in padded else 0
        groups.setdefault((prefix, width if digits else _NO_NUMBER), []).append(int(digits or 0))
    return ",".join(_write(prefix, width, sorted(group)) for (prefix, width), group in groups.items())


def _split(nodelist: str) -> list[str]:
    """Words between the commas that are outside brackets."""
    words, depth, begin = [], 0, 0
    for position, letter in enumerate(nodelist):
        if letter == "[":
            depth += 1
        elif letter == "]":
            depth -= 1
        elif letter == "," and depth == 0:
            words.append(nodelist[begin:position])
            begin = position + 1
        if depth not in (0, 1):
            raise ValueError(f"brackets do not match in {nodelist[:80]!r}")
    if depth:
        raise ValueError(f"brackets do not match in {nodelist[:80]!r}")
    return [word.strip() for word in [*words, nodelist[begin:]]]


def _alternatives(word: str) -> list[list[str]]:
    """The alternatives at each place of a word: fixed text is one alternative, a bracket many."""
    parts = re.split(r"\[([^\]]*)\]", word)
    if not word or any(re.search(r"[\s,\[\]]", fixed) for fixed in parts[::2]):
        raise ValueError(f"{word[:80]!r} is not a node list")
    return [[part] if index % 2 == 0 else _bracket(part) for index, part in enumerate(parts)]


def _bracket(text: str) -> list[str]:
    numbers: list[str] = []
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", item)
        if not match:
            raise ValueError(f"{item[:80]!r} is neither a number nor a range of numbers")
        first, last = match[1], match[2] or match[1]
        if not 0 <= int(last) - int(first) < _MAX_NODES:
            raise ValueError(f"{item[:80]!r} is not a range of nodes")
        numbers += (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return numbers


def _numbered(name: str) -> tuple[str, str]:
    match = _NUMBERED.fullmatch(name)
    return (match[1], match[2]) if match else (name, "")


def _write(prefix: str, width: int, numbers: list[int]) -> str:
    if width == _NO_NUMBER:
        return prefix
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    words = [
        str(first).zfill(width) if first == last else f"{str(first).zfill(width)}-{str(last).zfill(width)}"
        for first, last in ranges
    ]
    return prefix + (words[0] if len(numbers) == 1 else f"[{','.join(words)}]")
