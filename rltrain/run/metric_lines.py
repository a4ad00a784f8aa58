"""Lines of `metrics.jsonl`: a step's numbers. What else a line holds is left out, and named to who wants to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
_LARGEST = 2**31  # number of a step, or of an attempt


def _say_nothing(reason: str) -> None:
    """Nobody asks."""


def sound_row(row: Row, complain: Callable[[str], object] = _say_nothing) -> Row | None:
    """The row with a whole number as `step`, and numbers as its other values; None without such a step.

    Args:
        row: an object of the file.
        complain: is told the name and value of what is left out.
    """
    if None in row.values():
        row = {name: value for name, value in row.items() if value is not None}
    if not _is_whole(row.get("step")):
        if "step" in row:
            complain(f"step is {row['step']!r:.80}; expected a whole number")
        return None
    if not _is_whole(row.get("attempt", 0)):
        complain(f"attempt is {row['attempt']!r:.80}; expected a whole number")
        return None
    wrong = [name for name, value in row.items() if not isinstance(value, int | float)]
    for name in wrong:
        complain(f"{name} is {row[name]!r:.80}; expected a number")
    return {name: value for name, value in row.items() if name not in wrong} if wrong else row


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST


def newest_rows(rows: Iterable[Row]) -> dict[int, Row]:
    """Of lines of `metrics.jsonl` the newest row of each step, by step. See `add_row`."""
    newest: dict[int, Row] = {}
    for row in rows:
        add_row(newest, row)
    return newest


def add_row(newest: dict[int, Row], row: Row) -> None:
    """Put a line of `metrics.jsonl` into the newest rows by step; a line without a step is left out.

    A step that is trained again replaces its first try. Lines with the same step and attempt are one row: an evaluation
    may come later than its step.
    """
    sound = sound_row(row)
    if sound is None:
        return
    before = newest.get(sound["step"], {})
    is_same = "attempt" in sound and before.get("attempt") == sound["attempt"]
    newest[sound["step"]] = before | sound if is_same else sound
