"""Samples of a run: which files and columns to read (few by default, more on request), and reading many small files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from analysis.reading.errors import NotInRunError, damaged
from analysis.reading.progress import progress
from rltrain.run.layout import RunLayout
from rltrain.schema import SCHEMA, TRAINER_SCHEMA

if TYPE_CHECKING:
    import pandas as pd

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

# As much is in memory twice while a thread puts the block's columns together.
_BLOCK = 100  # files
_THREADS = 2  # more of them mostly wait for the interpreter lock
_SMALL = 1 << 17  # bytes: read as a whole, which is one request to the file system


def column_names(columns: Columns) -> list[str]:
    """Names that `columns` stands for; a list of names always gets the key columns too.

    Raises:
        NotInRunError: an unknown name.
    """
    if isinstance(columns, str):
        if columns not in _SETS:
            raise NotInRunError(
                f'unknown columns "{columns}": choose from {", ".join(_SETS)}, or give a list of names'
            )
        return _SETS[columns]
    unknown = [name for name in columns if name not in ALL]
    if unknown:
        raise NotInRunError(f"samples have no column {', '.join(unknown)}; they have {', '.join(ALL)}")
    return list(dict.fromkeys([*KEYS, *columns]))


def read_training(
    layout: RunLayout | None,
    columns: Columns,
    steps: int | Iterable[int] | None,
    indices: Collection[int] | None = None,
    *,
    strict: bool,
) -> pd.DataFrame:
    """Training samples of the wanted steps (all if None), with what the trainer saw of them if that is asked for.

    With `indices` only those with such an `index`: the others are never in memory all at once.

    Raises:
        NotInRunError: an unknown column, or a step without samples.
        DamagedFileError: a file is damaged, if `strict`.
    """
    files = select_files(lambda some: layout.sample_files(steps=some) if layout else {}, steps)
    names, paths = column_names(columns), [path for own in files.values() for path in own]
    if layout is None or not set(names) & set(TRAINER):
        return read_frame(paths, names, indices, strict=strict)
    wanted = list(dict.fromkeys([*names, "response_length"]))
    frame = read_frame(paths, wanted, indices, strict=strict)
    there = layout.trainer_files(files)
    trainer_names = ["step", "attempt", "index", *(name for name in names if name in TRAINER)]
    trainer_paths = [path for step in files for path in there.get(step, [])]
    trainer = _table(trainer_paths, trainer_names, indices, strict).to_pandas()
    return _with_trainer(frame, trainer)[names]


def read_evaluations(
    layout: RunLayout | None,
    columns: Columns,
    steps: int | Iterable[int] | None = None,
    datasets: Sequence[str] | None = None,
    indices: Collection[int] | None = None,
    *,
    strict: bool,
) -> pd.DataFrame:
    """Evaluation samples of some of `RunLayout.eval_datasets` (all if None) and of the wanted steps (all if None).

    With `indices` only those with such an `index`.

    Raises:
        NotInRunError: an unknown column, or a step without samples.
        DamagedFileError: a file is damaged, if `strict`.
    """
    names = column_names(columns)
    wanted = layout.eval_datasets() if layout and datasets is None else datasets or ()
    files = (
        {each: select_files(partial(layout.sample_files, each), steps) for each in wanted} if layout else {}
    )
    paths = {each: [path for part in found.values() for path in part] for each, found in files.items()}
    own = [path for each in paths if "/" not in each for path in paths[each]]
    # Files of later evaluations know the set, but not the evaluation's name.
    later = [_of_dataset(_table(paths[each], names, indices, strict), each) for each in paths if "/" in each]
    table = pa.concat_tables([_table(own, names, indices, strict), *later]).unify_dictionaries()
    del later
    return table.to_pandas(split_blocks=True, self_destruct=True)


def _of_dataset(table: pa.Table, dataset: str) -> pa.Table:
    at = table.column_names.index("dataset")
    return table.set_column(at, "dataset", pa.array([dataset] * len(table), pa.string()).dictionary_encode())


def read_frame(
    files: Sequence[Path], columns: Columns, indices: Collection[int] | None = None, *, strict: bool
) -> pd.DataFrame:
    """Rows of `files` in order, with `indices` of those alone. Columns that an older file lacks are missing values.

    Raises:
        DamagedFileError: a file is not readable Parquet, if `strict`; otherwise it is named and left out.
    """
    table = _table(files, column_names(columns), indices, strict)
    return table.to_pandas(split_blocks=True, self_destruct=True)


def select_files(
    find: Callable[[Collection[int] | None], dict[int, list[Path]]], steps: int | Iterable[int] | None
) -> dict[int, list[Path]]:
    """The files of the wanted steps (all if None), by step; `find` gets those of some steps, or of all.

    Raises:
        NotInRunError: a wanted step has no samples.
    """
    if steps is None:
        return find(None)
    wanted = [steps] if isinstance(steps, int) else sorted(set(steps))
    files = find(wanted)
    missing = [step for step in wanted if step not in files]
    if missing:
        files = find(None)
        there = f"steps {min(files)} to {max(files)} have some" if files else "the run has none yet"
        raise NotInRunError(f"no samples of step {', '.join(map(str, missing))}: {there}")
    return {step: files[step] for step in wanted}


def _table(
    files: Sequence[Path], names: Sequence[str], indices: Collection[int] | None, strict: bool
) -> pa.Table:
    categories = [name for name in _CATEGORIES if name in names]
    return read_files(files, pa.schema([_FIELDS[name] for name in names]), categories, indices, strict=strict)


def _with_trainer(frame: pd.DataFrame, trainer: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the lists of `trainer`, by step and index, where they belong to the same sample.

    They do not if the step was generated again after it had been trained on: then the trainer's attempt is older.
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


@dataclass(frozen=True)
class _Block:
    table: pa.Table
    unreadable: list[tuple[Path, str]]


def read_files(
    files: Sequence[Path],
    schema: pa.Schema,
    categories: Sequence[str] = (),
    indices: Collection[int] | None = None,
    *,
    strict: bool,
) -> pa.Table:
    """Columns of `schema` of all files, in order. A column that a file lacks is null in its rows.

    Args:
        categories: columns of texts that take few values; they come as dictionaries.
        indices: only rows with such an `index`, which is one of the columns.

    Raises:
        DamagedFileError: a file is not readable Parquet, if `strict`; otherwise it is named and left out.
    """
    starts = range(0, len(files), _BLOCK)
    chosen = None if indices is None else pa.array(indices, _FIELDS["index"].type)
    with ThreadPoolExecutor(_THREADS) as threads:
        work = [
            threads.submit(_read_block, files[i : i + _BLOCK], schema, categories, chosen) for i in starts
        ]
        blocks = [future.result() for future in progress(work, "reading samples")]
    for path, reason in (problem for block in blocks for problem in block.unreadable):
        damaged(path, reason, strict=strict)
    tables = [block.table for block in blocks] or [_encoded(schema.empty_table(), categories)]
    return pa.concat_tables(tables).unify_dictionaries()


def _read_block(
    files: Sequence[Path], schema: pa.Schema, categories: Sequence[str], chosen: pa.Array | None
) -> _Block:
    tables, unreadable = [], []
    for path in files:
        try:
            table = _read_file(path, schema)
            tables.append(table if chosen is None else table.filter(_is_in(table["index"], chosen)))
        except (pa.ArrowException, OSError) as error:
            unreadable.append((path, str(error).partition("\n")[0]))
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    if not any(
        pa.types.is_list(field.type) for field in schema
    ):  # one chunk of lists holds 2³¹ numbers at most
        table = table.combine_chunks()
    return _Block(_encoded(table, categories), unreadable)


def _read_file(path: Path, schema: pa.Schema) -> pa.Table:
    import pyarrow.parquet as pq  # costs half of what importing pandas does

    # For a file of some kilobytes, a dataset costs several times as much. Never mapped into memory: a file that a
    # network file system takes away would end the process.
    with pa.OSFile(str(path)) as file:
        is_small = file.size() <= _SMALL
        source = pa.BufferReader(file.read_buffer()) if is_small else file
        reader = pq.ParquetFile(source, pre_buffer=not is_small)
        table = reader.read(columns=schema.names, use_threads=False)
    if table.schema.equals(schema, check_metadata=False):
        return table
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _is_in(values: pa.ChunkedArray, chosen: pa.Array) -> pa.ChunkedArray:
    import pyarrow.compute as pc

    return pc.is_in(values, value_set=chosen)


def _encoded(table: pa.Table, categories: Sequence[str]) -> pa.Table:
    for name in categories:
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    return table
