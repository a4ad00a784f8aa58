"""A progress bar that only appears where the work turns out to be slow."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

_PATIENCE = 1.0  # seconds

T = TypeVar("T")


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """`items`; from the second second on with a bar on stderr, if a person looks at it."""
    started = time.monotonic()
    bar = None
    try:
        for number, item in enumerate(items):
            if bar is None and time.monotonic() - started > _PATIENCE and sys.stderr.isatty():
                from rich.console import Console
                from rich.progress import Progress

                bar = Progress(console=Console(stderr=True), transient=True)
                bar.start()
                task = bar.add_task(label, total=len(items), completed=number)
            yield item
            if bar is not None:
                bar.advance(task)
    finally:
        if bar is not None:
            bar.stop()
