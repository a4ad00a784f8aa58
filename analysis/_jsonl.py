"""Read files of one JSON object a line, also while another process appends to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from analysis._errors import damaged


def read_jsonl(path: Path, *, strict: bool) -> list[dict[str, Any]]:
    """The objects of `path` in file order; no such file is an empty list.

    A last line without its newline is still being written: left out without a word. Any other line that is
    not a JSON object is named in a `DamagedFileWarning`.

    Raises:
        DamagedFileError: a line is not a JSON object, if `strict`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    finished, _, _ = content.rpartition(b"\n")
    rows = []
    for number, line in enumerate(finished.split(b"\n"), start=1):
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
