"""Rows of prompt files: JSONL, one object a line, as slime reads them, or Parquet (`.parquet`), one row a prompt.

`path@[a:b]` takes the lines (rows) a to b, as a Python slice does.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rltrain.arguments.errors import UserError

Message = dict[str, Any]

_SLICE = re.compile(r"(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file."""

    prompt: str | list[Message]
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None


def split_slice(path: str) -> tuple[Path, slice]:
    """`file@[a:b]` → the file and slice(a, b); without it, everything."""
    match = _SLICE.fullmatch(path)
    if match is None:
        return Path(path), slice(None)
    start, stop = (int(match[name]) if match[name] else None for name in ("start", "stop"))
    return Path(match["path"]), slice(start, stop)


def parse_line(
    line: str,
    where: str,
    input_key: str,
    label_key: str | None = None,
    metadata_key: str = "metadata",
    tool_key: str = "tools",
) -> Prompt:
    """One line of a prompt file; `where` (file:line) is for the message.

    Raises:
        UserError: it is not a JSON object with these keys.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{where}: not valid JSON ({error}). A prompt file has one JSON object a line."
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, where an object with the prompt is wanted.")
    return parse_row(row, where, input_key, label_key, metadata_key, tool_key)


def parse_row(
    row: dict[str, Any],
    where: str,
    input_key: str,
    label_key: str | None = None,
    metadata_key: str = "metadata",
    tool_key: str = "tools",
) -> Prompt:
    """A prompt from its keys and values; `where` is for the message.

    Raises:
        UserError: a key is missing, or its value has the wrong type.
    """
    prompt = _require(row, input_key, "--input-key", where)
    if not isinstance(prompt, str) and not _is_conversation(prompt):
        raise UserError(
            f"{where}: {input_key!r} holds a {type(prompt).__name__}, where a text or a list of messages, each"
            " with 'role' and 'content', is wanted."
        )
    return Prompt(
        prompt=prompt,
        label=None if label_key is None else _require(row, label_key, "--label-key", where),
        metadata=_metadata(row.get(metadata_key), metadata_key, where),
        tools=row.get(tool_key),
    )


def _require(row: dict[str, Any], key: str, flag: str, where: str) -> Any:
    if key not in row:
        keys = ", ".join(map(repr, row)) or "none at all"
        raise UserError(
            f"{where}: no key {key!r}; the keys of this line are {keys}. {flag} says which to read."
        )
    return row[key]


def _metadata(value: Any, key: str, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str):  # Parquet files often hold it as JSON
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key!r} holds a {type(value).__name__}, where an object is wanted.")
    return value


def _is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(each, dict) and "role" in each and "content" in each for each in prompt)
    )
