"""Prompt files: JSONL, one object a line, as slime reads them, or Parquet (`.parquet`), one row a prompt.

`path@[a:b]` takes the lines (rows) a to b, as a Python slice does.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
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


def check_prompt_file(
    path: str, input_key: str, label_key: str | None, metadata_key: str = "metadata"
) -> int:
    """Read the whole file, keep nothing, and return the number of prompts.

    Raises:
        UserError: see `read_prompts`.
    """
    return sum(1 for _ in read_prompts(path, input_key, label_key, metadata_key))


def read_prompts(
    path: str,
    input_key: str,
    label_key: str | None = None,
    metadata_key: str = "metadata",
    tool_key: str = "tools",
) -> Iterator[Prompt]:
    """The prompts of a file, one at a time. Metadata and tools are optional, the other keys are not.

    Raises:
        UserError: no such file, nothing in it (or in the slice), a line that is not a JSON object, a missing
            key or a value of the wrong type; the message has file and line.
    """
    file, window = split_slice(path)
    if not file.is_file():
        what = "it is a directory" if file.is_dir() else "there is no such file"
        raise UserError(f"prompt file {file}: {what}. Give a JSONL file: one JSON object a line.")
    keys = (input_key, label_key, metadata_key, tool_key)
    count = 0
    if file.suffix == ".parquet":
        for number, row in _parquet_rows(file, window, keys):
            yield parse_row(row, f"{file}, row {number}", *keys)
            count += 1
    else:
        with file.open(encoding="utf-8") as lines:
            for number, line in _window(lines, window, file):
                yield parse_line(line, f"{file}:{number}", *keys)
                count += 1
    if count == 0:
        where = f"{path}: no prompts in that slice" if path != str(file) else f"{file}: no prompts in it"
        raise UserError(f"prompt file {where}. Give a JSONL file with one JSON object a line.")


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


def _parquet_rows(
    file: Path, window: slice, keys: tuple[str | None, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of the slice, read in batches, only the columns that have a key."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"prompt file {file}: not a Parquet file ({error}).") from None
    wanted = range(parquet.metadata.num_rows)[window]
    columns = [name for name in parquet.schema_arrow.names if name in keys]
    if not columns:  # the first missing key is named by who parses the row
        columns = parquet.schema_arrow.names
    number = 0
    for batch in parquet.iter_batches(batch_size=1000, columns=columns):
        if number + len(batch) > wanted.start and number < wanted.stop:
            for i, row in enumerate(batch.to_pylist(), start=number):
                if i in wanted:
                    yield i, row
        number += len(batch)


def _window(lines: Iterator[str], window: slice, file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, those of the slice only; numbers count from 1 in the file."""
    numbered = ((number, line) for number, line in _decoded(lines, file) if line.strip())
    start, stop = window.start, window.stop
    if (start is not None and start < 0) or (stop is not None and stop < 0):
        return iter(list(numbered)[window])  # counted from the end: the end has to be known
    return islice(numbered, start, stop)


def _decoded(lines: Iterator[str], file: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            yield number, line
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}:{number + 1} or soon after: not UTF-8 ({error}). Prompt files are UTF-8."
        ) from None
