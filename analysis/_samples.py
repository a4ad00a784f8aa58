"""Which samples of a run to read, and which of their columns: few by default, more on request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from analysis._parquet import read_files
from rltrain.schema import SCHEMA, TRAINER_SCHEMA

if TYPE_CHECKING:
    import pandas as pd

    from hpc.layout import RunLayout

Columns = Literal["scalars", "text", "tokens", "all"] | Sequence[str]

KEYS = ["step", "attempt", "dataset", "group_index", "index"]
TEXT = ["prompt", "response", "label", "rewards", "metadata"]
# Written by the trainer into files of its own; in samples of schema 2 some of them are columns.
TRAINER = [name for name in TRAINER_SCHEMA.names if name not in SCHEMA.names]
TOKENS = [*(field.name for field in SCHEMA if pa.types.is_list(field.type)), *TRAINER]
SCALARS = [name for name in SCHEMA.names if name not in {*TEXT, *TOKENS}]
ALL = [*SCHEMA.names, *TRAINER]

_SETS = {"scalars": SCALARS, "text": SCALARS + TEXT, "tokens": SCALARS + TOKENS, "all": ALL}
_FIELDS = {field.name: field for field in (*TRAINER_SCHEMA, *SCHEMA)}
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
    unknown = [name for name in columns if name not in ALL]
    if unknown:
        raise ValueError(f"samples have no column {', '.join(unknown)}; they have {', '.join(ALL)}")
    return list(dict.fromkeys([*KEYS, *columns]))


def read_training(
    layout: RunLayout | None, columns: Columns, steps: int | Iterable[int] | None, *, strict: bool
) -> pd.DataFrame:
    """Training samples of the wanted steps (all if None), with what the trainer saw of them if that is asked for.

    Raises:
        ValueError: an unknown column, or a step without samples.
        DamagedFileError: a file is damaged, if `strict`.
    """
    files = select_files(layout.sample_files() if layout else {}, steps)
    names = column_names(columns)
    if layout is None or not set(names) & set(TRAINER):
        return read_frame([path for paths in files.values() for path in paths], names, strict=strict)
    wanted = list(dict.fromkeys([*names, "response_length"]))
    frame = read_frame([path for paths in files.values() for path in paths], wanted, strict=strict)
    there = layout.trainer_files()
    trainer_names = ["step", "attempt", "index", *(name for name in names if name in TRAINER)]
    trainer_paths = [path for step in files for path in there.get(step, [])]
    trainer = _table(trainer_paths, trainer_names, strict).to_pandas()
    return _with_trainer(frame, trainer)[names]


def read_frame(files: Sequence[Path], columns: Columns, *, strict: bool) -> pd.DataFrame:
    """Rows of `files` in order. Columns that an older file lacks are missing values.

    Raises:
        DamagedFileError: a file is not readable Parquet, if `strict`; otherwise it is named and left out.
    """
    table = _table(files, column_names(columns), strict)
    return table.to_pandas(split_blocks=True, self_destruct=True)


def select_files(files: dict[int, list[Path]], steps: int | Iterable[int] | None) -> dict[int, list[Path]]:
    """The files of the wanted steps (all if None), by step.

    Raises:
        ValueError: a wanted step has no samples.
    """
    if steps is None:
        return files
    wanted = [steps] if isinstance(steps, int) else sorted(set(steps))
    missing = [step for step in wanted if step not in files]
    if missing:
        there = f"steps {min(files)} to {max(files)} have" if files else "the run has none yet"
        raise ValueError(f"no samples of step {', '.join(map(str, missing))}: {there}")
    return {step: files[step] for step in wanted}


def _table(files: Sequence[Path], names: Sequence[str], strict: bool) -> pa.Table:
    categories = [name for name in _CATEGORIES if name in names]
    return read_files(files, pa.schema([_FIELDS[name] for name in names]), categories, strict=strict)


def _with_trainer(frame: pd.DataFrame, trainer: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the lists of `trainer`, by step and index, where they belong to the same sample.

    They do not if the step was generated anew after it had been trained on: then the trainer's attempt is older.
    """
    import pandas as pd

    keys = ["step", "index"]
    newest = trainer.drop_duplicates(keys, keep="last").set_index(keys)
    found = newest.reindex(pd.MultiIndex.from_frame(frame[keys]))
    fits = found["attempt"].to_numpy() >= frame["attempt"].to_numpy()
    for name in newest.columns.intersection(TRAINER):
        lists = zip(fits, found[name], frame[name], frame["response_length"], strict=True)
        values = [new if fit and len(new) == length else old for fit, new, old, length in lists]
        frame[name] = pd.Series(values, index=frame.index, dtype=object)
    return frame
