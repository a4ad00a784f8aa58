"""Metrics and events, files of JSON lines that may still grow: as frames, with the damaged lines named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from analysis.reading.errors import damaged
from rltrain.run.files import finished_lines, parse_lines
from rltrain.run.metric_lines import sound_row

if TYPE_CHECKING:
    import pandas as pd

Check = Callable[[dict[str, Any], Callable[[str], object]], dict[str, Any] | None]
_LATEST = 1e11  # Unix seconds


def read_events(path: Path, *, strict: bool) -> list[dict[str, Any]]:
    """The events in `path` in file order; no such file is an empty list.

    A last line without its newline is still being written: it is left out silently. Any other line that is
    not a JSON object is named in a `DamagedFileWarning`.

    Raises:
        DamagedFileError: a line is not a JSON object, if `strict`.
    """
    return _parse(finished_lines(path), path, strict, _sound_event)


def read_metrics(path: Path, *, strict: bool) -> pd.DataFrame:
    """The lines of `metrics.jsonl` as a frame: a row a line, its keys in the order of their first appearance.

    A value that is not a number is left out, and so is a line whose step is not a number; both are named.

    Raises:
        DamagedFileError: a line is not a JSON object of numbers with a step, if `strict`.
    """
    lines = finished_lines(path)
    frame = _read_numbers(lines)
    return rows_frame(_parse(lines, path, strict, sound_row)) if frame is None else frame


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


def _parse(lines: bytes, path: Path, strict: bool, check: Check) -> list[dict[str, Any]]:
    return parse_lines(
        lines, lambda number, reason: damaged(f"{path}:{number}", reason, strict=strict), check
    )


def _sound_event(event: dict[str, Any], complain: Callable[[str], object]) -> dict[str, Any] | None:
    """The event with numbers where frames need them; None for one without a time."""
    time, kept = event.get("time"), dict(event)
    if not isinstance(time, int | float) or not 0 <= time < _LATEST:
        complain(f"time is {time!r:.80}; expected seconds since 1970")
        return None
    for name in ("attempt", "index"):
        if not isinstance(event.get(name), int | None) or abs(event.get(name) or 0) >= 2**63:
            complain(f"{name} is {event[name]!r:.80}; expected a whole number")
            del kept[name]
    return kept


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
    """Whether each of that many flat objects has a line of its own, and there is no other line.

    pyarrow also takes several objects in a line, and one in several lines: `json` would call those damaged.
    """
    import numpy as np

    text = np.frombuffer(lines, np.uint8)
    breaks = np.flatnonzero(text[1:-1] == ord("\n")) + 1
    are_between = (text[breaks - 1] == ord("}")) & (text[breaks + 1] == ord("{"))
    return bool(are_between.all()) and len(breaks) + 1 == objects
