"""The values in what Slurm's commands print: times, durations, resources, `key=value` lines."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_NOTHING = {"", "none", "unknown", "n/a", "(null)", "invalid", "none assigned"}
_ENDLESS = {"unlimited", "infinite", "partition_limit", "not_set"}
# A key begins with a capital letter: spaces in values (`OS=Linux 6.1`, `Reason=disk is full`) do not end them.
_KEY = re.compile(r"(?:^|\s)([A-Z][\w/:.&-]*)=")
_DURATION = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?(?:\.\d+)?")


def text_or_none(text: str) -> str | None:
    """A word, None where Slurm has nothing to say."""
    return None if text.strip().lower() in _NOTHING else text.strip()


def parse_time(text: str) -> datetime | None:
    """A point in time, in UTC; None for `Unknown`, `None` and the like.

    Digits are seconds since 1970, which is what SLURM_TIME_FORMAT=%s asks for; `2026-11-22T11:28:17` is this
    machine's local time, which Slurm writes by default.
    """
    word = text_or_none(text)
    if word is None:
        return None
    if word.isdigit():
        return datetime.fromtimestamp(int(word), UTC) if int(word) else None
    return datetime.fromisoformat(word).astimezone(UTC)


def parse_duration(text: str) -> float | None:
    """Seconds of `[days-]hours:minutes:seconds`, `minutes:seconds`; None if it has no end or is unknown.

    With days the first number after them is hours, whatever follows: `2-12` is two days and a half.

    Raises:
        ValueError: the text is not a duration.
    """
    word = text_or_none(text)
    if word is None or word.lower() in _ENDLESS:
        return None
    match = _DURATION.fullmatch(word)
    if not match:
        raise ValueError(f"{text!r} is not a duration")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is None:  # the numbers end with seconds; a lone one is minutes
        numbers = [0] * (3 - len(numbers)) + numbers if len(numbers) > 1 else [0, numbers[0], 0]
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return timedelta(days=int(days or 0), hours=hours, minutes=minutes, seconds=seconds).total_seconds()


def parse_exit_code(text: str) -> tuple[int, int] | None:
    """Exit code and signal of `3:0`."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    return (int(match[1]), int(match[2])) if match else None


def parse_tres(text: str) -> dict[str, str]:
    """Trackable resources: `cpu=2,gres/gpu:h100=4,mem=2000M` by name."""
    return dict(item.split("=", 1) for item in text.split(",") if "=" in item)


def gpus_of_tres(text: str) -> int:
    """Number of GPUs in trackable resources. A GPU of a type is counted under `gres/gpu` too, if that is tracked."""
    tres = parse_tres(text)
    if "gres/gpu" in tres:
        return int(tres["gres/gpu"])
    return sum(int(count) for name, count in tres.items() if name.startswith("gres/gpu:"))


def gpus_of_gres(text: str) -> dict[str, int]:
    """GPUs by type, `""` for those without one: `gpu:h100:4(S:0-1),gpu:2,shard:8` → {"h100": 4, "": 2}."""
    found: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)", "", text).split(","):
        match = re.fullmatch(r"gpu(?::([^:]+))??(?::(\d+))?", item.strip())
        if match:
            kind, count = match[1] or "", int(match[2] or 1)
            found[kind] = found.get(kind, 0) + count
    return {kind: count for kind, count in found.items() if count}


def parse_key_values(line: str) -> dict[str, str]:
    """One line of `scontrol show … -o`."""
    keys = list(_KEY.finditer(line))
    ends = [key.start() for key in keys[1:]] + [len(line)]
    return {key[1]: line[key.end() : end].strip() for key, end in zip(keys, ends, strict=True)}
