"""The result of a check of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line: the thing that was checked, its state and, unless that is fine, what to do."""

    name: str
    level: Level
    message: str
    advice: str = ""


def ok(name: str, message: str) -> Check:
    """It is fine."""
    return Check(name, "ok", message)


def warn(name: str, message: str, advice: str = "") -> Check:
    """It may go wrong."""
    return Check(name, "warn", message, advice)


def fail(name: str, message: str, advice: str = "") -> Check:
    """A job would fail."""
    return Check(name, "fail", message, advice)
