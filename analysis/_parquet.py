"""Read many small Parquet files into one table: a few threads, a block of files each, little memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from analysis._errors import damaged
from analysis._progress import progress

# As much is in memory twice while a thread puts the block's columns together.
_BLOCK = 100  # files
_THREADS = 2  # more of them mostly wait for the interpreter lock
_SMALL = 1 << 17  # bytes: read as a whole, which is one request to the file system


@dataclass(frozen=True)
class _Block:
    table: pa.Table
    unreadable: list[tuple[Path, str]]


def read_files(
    files: Sequence[Path], schema: pa.Schema, categories: Sequence[str] = (), *, strict: bool
) -> pa.Table:
    """Columns of `schema` of all files, in order. A column that a file lacks is null in its rows.

    Args:
        categories: columns of texts that take few values; they come as dictionaries.

    Raises:
        DamagedFileError: a file is not readable Parquet, if `strict`; otherwise it is named and left out.
    """
    starts = range(0, len(files), _BLOCK)
    with ThreadPoolExecutor(_THREADS) as threads:
        work = [threads.submit(_read_block, files[i : i + _BLOCK], schema, categories) for i in starts]
        blocks = [future.result() for future in progress(work, "reading samples")]
    for path, reason in (problem for block in blocks for problem in block.unreadable):
        damaged(path, reason, strict=strict)
    tables = [block.table for block in blocks] or [_encoded(schema.empty_table(), categories)]
    return pa.concat_tables(tables).unify_dictionaries()


def _read_block(files: Sequence[Path], schema: pa.Schema, categories: Sequence[str]) -> _Block:
    tables, unreadable = [], []
    for path in files:
        try:
            tables.append(_read_file(path, schema))
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


def _encoded(table: pa.Table, categories: Sequence[str]) -> pa.Table:
    for name in categories:
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    return table
