"""Samples on disk: a Parquet file is there and whole, or not there at all."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FILE_NAME = "part-0.parquet"


def write_table(table: pa.Table, directory: Path) -> Path:
    """Write `directory/part-0.parquet`, replacing what an interrupted try may have left."""
    return write_file(table, directory / FILE_NAME)


def write_file(table: pa.Table, path: Path) -> Path:
    """Write the file, in whichever directory, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # readers of the directory skip names with a leading dot
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_directory(path.parent)
    return path


def read_table(directory: Path) -> pa.Table:
    """The table that `write_table` wrote there, with its schema metadata."""
    return pq.read_table(directory / FILE_NAME, partitioning=None)


def _sync_directory(directory: Path) -> None:
    """Make the rename durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
