"""Prompt files: JSONL, one object a line, as slime reads them; Parquet (`.parquet`) or CSV (`.csv`), one row a prompt.

`path@[a:b]` takes the lines (rows) a to b, as a Python slice does. Files stay on disk and may exceed memory: any row is
read when it is asked for. Of a JSONL file only the start of each line is kept, 8 bytes a line. A Parquet file is
unpacked once into a temporary Arrow file (under `TMPDIR`) that is mapped into memory, because its own rows can only be
read in large groups.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import os
import re
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rltrain.run.errors import UserError
from rltrain.sample import Message

_SLICE = re.compile(r"(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file."""

    prompt: str | list[Message]
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None


class Keys(NamedTuple):
    """The keys of a row, or a table's columns: those of label, metadata and tools may be missing."""

    input: str
    label: str | None
    metadata: str
    tools: str


def split_slice(path: str) -> tuple[Path, slice]:
    """`file@[a:b]` → the file and slice(a, b); without it, everything."""
    match = _SLICE.fullmatch(path)
    if match is None:
        return Path(path), slice(None)
    start, stop = (int(match[name]) if match[name] else None for name in ("start", "stop"))
    return Path(match["path"]), slice(start, stop)


def parse_line(line: str, where: str, keys: Keys) -> Prompt:
    """One line of a prompt file; `where` (file:line) is for the message.

    Raises:
        UserError: it is not a JSON object with these keys.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{where}: not valid JSON ({error}). A prompt file has one JSON object per line."
        ) from None
    if "\\u" in line:
        _check_characters(row, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}; expected an object with the prompt.")
    return parse_row(row, where, keys)


def _check_characters(row: Any, where: str) -> None:
    r"""Refuse halves of characters, such as an escape \ud83d without the second one: no tokenizer takes them."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise UserError(
            f"{where}: the text has {half}, half a character, perhaps of an emoji that was cut in two. Write the"
            " whole character, or leave it out."
        ) from None


def parse_row(row: dict[str, Any], where: str, keys: Keys) -> Prompt:
    """A prompt from its keys and values; `where` is for the message.

    Raises:
        UserError: a key is missing, or its value has the wrong type.
    """
    prompt = _require(row, keys.input, "--input-key", where)
    if not isinstance(prompt, str) and not _is_conversation(prompt):
        raise UserError(
            f"{where}: {keys.input!r} holds a {type(prompt).__name__}; expected a text or a list of messages, each"
            " with 'role' and 'content'."
        )
    return Prompt(
        prompt=prompt,
        label=None if keys.label is None else _require(row, keys.label, "--label-key", where),
        metadata=_metadata(row.get(keys.metadata), keys.metadata, where),
        tools=row.get(keys.tools),
    )


def _require(row: dict[str, Any], key: str, flag: str, where: str) -> Any:
    if key not in row:
        keys = ", ".join(map(repr, row)) or "none at all"
        raise UserError(
            f"{where}: no key {key!r}; the keys of this line are {keys}. {flag} names the one to read."
        )
    return row[key]


def _metadata(value: Any, key: str, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if value == "":
        return {}  # an empty cell of a CSV file
    if isinstance(value, str):  # Parquet and CSV files often hold it as JSON
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key!r} holds a {type(value).__name__}; expected an object.")
    return value


def _is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(each, dict) and "role" in each and "content" in each for each in prompt)
    )


_LONGEST = 1 << 30  # characters of a value in a CSV file; Python's own limit is for unknown files
_BATCH = 128  # rows of a Parquet file that are in memory at a time


class PromptFile:
    """The prompts of `FILE` or `FILE@[a:b]`."""

    def __init__(
        self,
        path: str,
        input_key: str,
        label_key: str | None = None,
        metadata_key: str = "metadata",
        tool_key: str = "tools",
    ) -> None:
        """Find where the rows are; they are parsed when they are read. Metadata and tools are optional.

        Raises:
            UserError: no such file, or nothing in it or in the slice.
        """
        keys = Keys(input_key, label_key, metadata_key, tool_key)
        file, window = split_slice(path)
        if not file.is_file():
            what = "it is a directory" if file.is_dir() else "there is no such file"
            raise UserError(f"prompt file {file}: {what}. Give a JSONL file: one JSON object per line.")
        kinds: dict[str, type[_ParquetRows | _CsvRows]] = {".parquet": _ParquetRows, ".csv": _CsvRows}
        self._rows: _JsonLines | _ParquetRows | _CsvRows
        self._rows = kinds.get(file.suffix.lower(), _JsonLines)(file, window, keys)
        if not len(self._rows):
            where = f"{path}: no prompts in that slice" if path != str(file) else f"{file}: no prompts in it"
            raise UserError(f"prompt file {where}. Give a JSONL file with one JSON object per line.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Prompt:
        """Row i of the slice.

        Raises:
            UserError: the row does not hold a prompt; the message has file and line.
        """
        return self._rows.read(i)

    def __iter__(self) -> Iterator[Prompt]:
        """All rows in order, faster than one by one."""
        return iter(self._rows)


def check_prompt_file(
    path: str, input_key: str, label_key: str | None, metadata_key: str = "metadata"
) -> int:
    """Read the whole file, keep nothing, and return the number of prompts.

    Raises:
        UserError: no such file, nothing in it (or in the slice), a line that is not a JSON object, a missing
            key or a value of the wrong type; the message has file and line.
    """
    return sum(1 for _ in PromptFile(path, input_key, label_key, metadata_key))


class _JsonLines:
    """The lines that are not blank."""

    def __init__(self, file: Path, window: slice, keys: Keys) -> None:
        self._file, self._keys = file, keys
        self._descriptor = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        stop = (
            window.stop if window.stop is not None and window.stop >= 0 and (window.start or 0) >= 0 else None
        )
        self._starts = _line_starts(self._descriptor, stop)
        self._window = range(len(self._starts) - 1)[window]

    def __len__(self) -> int:
        return len(self._window)

    def __iter__(self) -> Iterator[Prompt]:
        return (self.read(i) for i in range(len(self)))

    def read(self, i: int) -> Prompt:
        line = self._window[i]
        begin, end = self._starts[line], self._starts[line + 1]
        content = os.pread(self._descriptor, end - begin, begin)
        try:
            return parse_line(content.decode(), str(self._file), self._keys)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._file}:{self._number(begin)}: not UTF-8 ({error}). Prompt files are UTF-8."
            ) from None
        except UserError:  # counting lines takes a while: only where somebody wants to know
            return parse_line(content.decode(), f"{self._file}:{self._number(begin)}", self._keys)

    def _number(self, begin: int) -> int:
        """Number of the line that begins there, counted from 1."""
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            return 1 + sum(
                file.read(min(1 << 20, begin - at)).count(b"\n") for at in range(0, begin, 1 << 20)
            )


def _line_starts(descriptor: int, stop: int | None) -> array[int]:
    """Where each line that is not blank begins, the first `stop` of them, and where the last one ends."""
    starts, at, end = array("q"), 0, 0
    with open(descriptor, "rb", closefd=False) as file:
        for line in file:
            if stop is not None and len(starts) == stop:
                break
            mark = len(codecs.BOM_UTF8) if at == 0 and line.startswith(codecs.BOM_UTF8) else 0
            if not line[mark:].isspace() and line[mark:]:
                starts.append(at + mark)
                end = at + len(line)
            at += len(line)
    starts.append(end)
    return starts


class _CsvRows:
    """The rows of a CSV file, whose first row names the columns. Every value is text: CSV has no other types."""

    def __init__(self, file: Path, window: slice, keys: Keys) -> None:
        self._file, self._keys = file, keys
        self._starts = array("q")
        self._header: list[str] = []
        for start, row in self._records():
            if self._header:
                self._starts.append(start)
            else:
                self._header = row
        self._window = range(len(self._starts))[window]

    def __len__(self) -> int:
        return len(self._window)

    def __iter__(self) -> Iterator[Prompt]:
        return (self.read(i) for i in range(len(self)))

    def read(self, i: int) -> Prompt:
        number = self._window[i]
        where = f"{self._file}, row {number + 1}"
        _, row = next(self._records(self._starts[number]))
        if len(row) != len(self._header):
            raise UserError(
                f"{where}: it has {len(row)} values, and the first row names {len(self._header)} columns."
            )
        return parse_row(dict(zip(self._header, row, strict=True)), where, self._keys)

    def _records(self, start: int = 0) -> Iterator[tuple[int, list[str]]]:
        """Where each row begins that is not blank, and its values; a value in quotes may have several lines."""
        at = start

        def lines() -> Iterator[str]:
            nonlocal at
            with self._file.open("rb") as file:
                file.seek(start)
                for line in file:
                    begin, at = at, at + len(line)
                    yield line.decode("utf-8" if begin else "utf-8-sig")

        csv.field_size_limit(_LONGEST)
        reader = csv.reader(lines(), strict=True)
        while True:
            begin = at
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{self._file}: not CSV in UTF-8 ({error}), at byte {begin}.") from None
            if row:
                yield begin, row


class _ParquetRows:
    """The rows of a Parquet file, only the columns that have a key."""

    def __init__(self, file: Path, window: slice, keys: Keys) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._file, self._keys = file, keys
        try:
            self._parquet = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"prompt file {file}: not a Parquet file ({error}).") from None
        self._window = range(self._parquet.metadata.num_rows)[window]
        self._batches: list[Any] = []  # mapped, not read
        self._starts: list[int] = []  # the first row of each

    def __len__(self) -> int:
        return len(self._window)

    def __iter__(self) -> Iterator[Prompt]:
        for start, batch in self._read():
            for i, row in enumerate(batch.to_pylist(), start=start):
                if i in self._window:
                    yield self._parse(row, i)

    def read(self, i: int) -> Prompt:
        if not self._batches:
            self._unpack()
        number = self._window[i]
        at = bisect_right(self._starts, number) - 1
        (row,) = self._batches[at].slice(number - self._starts[at], 1).to_pylist()
        return self._parse(row, number)

    def _parse(self, row: dict[str, Any], number: int) -> Prompt:
        return parse_row(row, f"{self._file}, row {number}", self._keys)

    def _read(self) -> Iterator[tuple[int, Any]]:
        names = self._parquet.schema_arrow.names
        columns = [name for name in names if name in self._keys]
        start = 0
        # Without any of them the first key that is missing is named by who parses the row.
        for batch in self._parquet.iter_batches(_BATCH, columns=columns or names):
            if start + len(batch) > self._window.start and start < self._window.stop:
                yield start, batch
            start += len(batch)

    def _unpack(self) -> None:
        import pyarrow as pa

        with tempfile.NamedTemporaryFile(prefix="prompts-", suffix=".arrow") as file:
            writer = None
            for start, batch in self._read():
                writer = writer or pa.ipc.new_file(file.name, batch.schema)
                writer.write_batch(batch)
                self._starts.append(start)
            assert writer is not None  # a row exists, or none could be requested
            writer.close()
            reader = pa.ipc.open_file(pa.memory_map(file.name))  # stays mapped when the name is gone
        self._batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
