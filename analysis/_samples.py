"""Read samples from a run's Parquet files into a frame: few columns by default, more on request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.dataset as ds

from analysis._errors import damaged
from rltrain.schema import SCHEMA

if TYPE_CHECKING:
    import pandas as pd

Columns = Literal["scalars", "text", "tokens", "all"] | Sequence[str]

TEXT = ["prompt", "response", "label", "rewards", "metadata"]
TOKENS = [field.name for field in SCHEMA if pa.types.is_list(field.type)]
SCALARS = [name for name in SCHEMA.names if name not in {*TEXT, *TOKENS}]
KEYS = ["step", "attempt", "dataset", "group_index", "index"]

_SETS = {"scalars": SCALARS, "text": SCALARS + TEXT, "tokens": SCALARS + TOKENS, "all": SCHEMA.names}
_CATEGORIES = ["dataset", "status"]  # few values, many rows


def column_names(columns: Columns) -> list[str]:
    """Names that `columns` stands for; a list of names always gets the key columns too.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(columns, str):
        if columns not in _SETS:
            raise ValueError(
                f'unknown columns "{columns}": choose from {", ".join(_SETS)}, or give a list of names'
            )
        return _SETS[columns]
    unknown = [name for name in columns if name not in SCHEMA.names]
    if unknown:
        raise ValueError(f"samples have no column {', '.join(unknown)}; they have {', '.join(SCHEMA.names)}")
    return list(dict.fromkeys([*KEYS, *columns]))


def select_files(files: dict[int, list[Path]], steps: int | Iterable[int] | None) -> list[Path]:
    """The files of the wanted steps (all if None), by step.

    Raises:
        ValueError: a wanted step has no samples.
    """
    wanted = list(files) if steps is None else [steps] if isinstance(steps, int) else sorted(set(steps))
    missing = [step for step in wanted if step not in files]
    if missing:
        there = f"steps {min(files)} to {max(files)} have" if files else "the run has none yet"
        raise ValueError(f"no samples of step {', '.join(map(str, missing))}: {there}")
    return [path for step in wanted for path in files[step]]


def read_frame(files: Sequence[Path], columns: Columns, *, strict: bool) -> pd.DataFrame:
    """Rows of `files` in order. Columns that an older file lacks are missing values.

    Raises:
        DamagedFileError: a file is not readable Parquet, if `strict`; otherwise it is named and left out.
    """
    names = column_names(columns)
    schema = pa.schema([SCHEMA.field(name) for name in names])
    try:
        table = _read(files, schema)
    except (pa.ArrowException, OSError):
        table = _read([path for path in files if _is_readable(path, schema, strict)], schema)
    for name in set(_CATEGORIES) & set(names):
        table = table.set_column(names.index(name), name, table[name].dictionary_encode())
    return table.to_pandas(split_blocks=True, self_destruct=True)


def _read(files: Sequence[Path], schema: pa.Schema) -> pa.Table:
    if not files:
        return schema.empty_table()
    return ds.dataset([str(path) for path in files], schema=schema, format="parquet").to_table()


def _is_readable(path: Path, schema: pa.Schema, strict: bool) -> bool:
    try:
        _read([path], schema)
    except (pa.ArrowException, OSError) as error:
        damaged(path, str(error).partition("\n")[0], strict=strict)
        return False
    return True
