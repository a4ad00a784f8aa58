"""Read files of one JSON object a line, also while another process appends to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from analysis._errors import damaged

if TYPE_CHECKING:
    import pandas as pd


def read_jsonl(path: Path, *, strict: bool) -> list[dict[str, Any]]:
    """The objects of `path` in file order; no such file is an empty list.

    A last line without its newline is still being written: left out without a word. Any other line that is
    not a JSON object is named in a `DamagedFileWarning`.

    Raises:
        DamagedFileError: a line is not a JSON object, if `strict`.
    """
    rows = []
    for number, line in enumerate(_finished(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            damaged(f"{path}:{number}", str(error), strict=strict)
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged(f"{path}:{number}", "the line is not a JSON object", strict=strict)
    return rows


def read_jsonl_frame(path: Path, *, strict: bool) -> pd.DataFrame:
    """The same as a frame: a row an object, its keys in the order of their first appearance.

    Raises:
        DamagedFileError: a line is not a JSON object, if `strict`.
    """
    frame = _read_numbers(_finished(path))
    return rows_frame(read_jsonl(path, strict=strict)) if frame is None else frame


def rows_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Objects as a frame; a key that an object lacks is missing in its row."""
    import pandas as pd

    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key) for row in rows] for key in keys}
    empty = [float("nan")] * len(rows)
    known = {
        key: empty if all(value is None for value in values) else values for key, values in columns.items()
    }
    return pd.DataFrame(known, index=range(len(rows)))


def _finished(path: Path) -> bytes:
    """The lines of a file that have their newline; nothing if there is no such file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    return content if content.endswith(b"\n") else content[: content.rfind(b"\n") + 1]


def _read_numbers(lines: bytes) -> pd.DataFrame | None:
    """Lines of nothing but numbers, several times as fast as with `json`; None if they hold anything else."""
    import pyarrow.json

    try:
        table = pyarrow.json.read_json(pa.BufferReader(lines))
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
    if not table.num_columns or not all(
        any(is_kind(field.type) for is_kind in kinds) for field in table.schema
    ):
        return None
    if not _has_one_a_line(lines, len(table)):
        return None
    nulls = [
        pa.field(field.name, pa.float64()) if pa.types.is_null(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(nulls)).to_pandas()


def _has_one_a_line(lines: bytes, objects: int) -> bool:
    """Whether each of so many flat objects has a line of its own, and there is no other line.

    pyarrow also takes several objects in a line, and one in several lines: `json` would call those damaged.
    """
    import numpy as np

    text = np.frombuffer(lines, np.uint8)
    breaks = np.flatnonzero(text[1:-1] == ord("\n")) + 1
    are_between = (text[breaks - 1] == ord("}")) & (text[breaks + 1] == ord("{"))
    return bool(are_between.all()) and len(breaks) + 1 == objects
