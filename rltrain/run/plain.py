"""What users' functions leave behind, as plain JSON and text: NumPy values, bytes, NaN, halves of characters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

_DEPTH = 64  # of nested values; what lies deeper, or holds itself, becomes text
_EXACT = 2**53  # a larger whole number is written as a float, which every reader takes


def plain_number(value: Any) -> float | int | None:
    """A number of Python, NumPy or torch (one element); None for anything else."""
    if not isinstance(value, int | float):
        item = getattr(value, "item", None)
        try:
            value = item() if callable(item) else float(value) if hasattr(value, "__float__") else None
        except (TypeError, ValueError, RuntimeError, OverflowError):  # several elements
            return None
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int):
        return value if abs(value) <= _EXACT else _as_float(value)
    return float(value) if isinstance(value, float) else None


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def plain_metrics(metrics: Any, where: str, complain: Callable[[str], object]) -> dict[str, float]:
    """Metrics as plain numbers; anything else is left out, and `complain` is told its key and value.

    Args:
        metrics: a mapping from names to numbers.
        where: whose they are, for the message.
    """
    if not isinstance(metrics, Mapping):
        complain(f"{where}: the metrics are a {type(metrics).__name__}; expected a dict: left out")
        return {}
    plain = {}
    for name, value in metrics.items():
        number = plain_number(value)
        if number is None:
            complain(f"{where}: the metric {name!r} is {value!r:.100}; expected a number: left out")
        else:
            plain[clean_text(str(name))] = number
    return plain


def plain_json(value: Any) -> str:
    """Any value as JSON that every reader takes: NumPy values as numbers and lists, NaN as null, the rest as text."""
    try:
        return clean_text(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return clean_text(json.dumps(_plain(value, 0), ensure_ascii=False, allow_nan=False))


def clean_text(text: str) -> str:
    """Halves of characters (lone surrogates) cannot be written as UTF-8: as question marks."""
    return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if depth > _DEPTH:
        return f"{type(value).__name__} (nested too deep)"
    if isinstance(value, Mapping):
        return {str(key): _plain(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each, depth + 1) for each in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    number = plain_number(value)
    if number is not None:
        return number if math.isfinite(number) else None
    to_list = getattr(value, "tolist", None)
    try:
        return _plain(to_list(), depth + 1) if callable(to_list) else str(value)
    except Exception as error:  # a __str__ of a user's class
        return f"{type(value).__name__} ({type(error).__name__})"
