"""Notes that people make on samples: kept in the run directory, a line each, and read as a frame."""

from __future__ import annotations

import getpass
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.frames.steps import with_time
from rltrain.run.files import append_line
from rltrain.run.plain import clean_text

NOTE_COLUMNS = ["time", "author", "dataset", "step", "attempt", "index", "tags", "text"]


def write_note(path: Path, sample: pd.Series, text: str, tags: Sequence[str]) -> None:
    """Append a note on a sample, a row of `samples` or `evals`.

    Raises:
        PermissionError: the run is another user's.
    """
    keys = {name: int(sample[name]) for name in ("step", "attempt", "index")}
    own = {"time": time.time(), "author": _author(), "dataset": str(sample["dataset"]), **keys}
    append_line(path, {**own, "tags": [clean_text(tag) for tag in tags], "text": clean_text(text)})


def notes_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a note, the oldest first."""
    kept = [{name: row.get(name) for name in NOTE_COLUMNS} for row in rows]
    frame = pd.DataFrame(kept, columns=NOTE_COLUMNS).astype(
        {"step": "Int64", "attempt": "Int64", "index": "Int64"}
    )
    return with_time(frame)


def _author() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        return None
