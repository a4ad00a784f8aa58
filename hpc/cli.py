"""The parts that all verbs share: run names, errors for people, exit codes, tables.

A table is drawn with rich on a terminal; elsewhere it is plain columns, which `awk` and `less` can read.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rltrain.run import errors
from rltrain.run.errors import EXIT_INTERRUPTED, nearest
from rltrain.run.layout import RunLayout
from rltrain.run.terminal import visible

EXIT_OK, EXIT_FAIL = 0, 1
_READER_HAS_GONE = 128 + signal.SIGPIPE
EXIT_CODES = "exit codes: 0 done, 2 bad input, 130 interrupted"


class _Parser(argparse.ArgumentParser):
    """Names the nearest flag where one is mistyped."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized"):
            typed = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            near = {word: nearest(word, self._option_string_actions) for word in typed}
            message += "".join(f"; did you mean {found}?" for found in near.values() if found)
        super().error(message)


def make_parser(
    module: str, doc: str | None, example: str, exit_codes: str = EXIT_CODES
) -> argparse.ArgumentParser:
    """A parser for `python -m MODULE` whose help shows the module's docstring, an example and the exit codes."""
    return _Parser(
        prog=f"python -m {module}",
        description=doc,
        epilog=f"example:\n  {example}\n\n{exit_codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_runs_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--runs-dir`."""
    parser.add_argument(
        "--runs-dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="directory of the runs (default: ./runs)",
    )


def command(verb: str, layout: RunLayout, *words: str) -> str:
    """A command line that a person can copy: `python -m hpc.VERB RUN`, with `--runs-dir` if it takes that."""
    place = shlex.quote(str(shown(layout.root.parent)))
    where = [] if place == "runs" else ["--runs-dir", place]
    return " ".join([python_command(), "-m", f"hpc.{verb}", layout.name, *words, *where])


def python_command() -> str:
    """The command for the Python that runs this: `python`, or its path where `python` is another one."""
    ours = (
        Path(sys.executable).absolute().with_name("python")
    )  # python3 and python3.11 beside it are the same
    found = shutil.which("python")
    return "python" if found and Path(found).absolute() == ours else shlex.quote(str(shown(ours)))


def shown(path: Path) -> Path:
    """The path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def run_main(main: Callable[[list[str]], int]) -> int:
    """Run a verb with the words of the command line; a `UserError` becomes one line and exit code 2."""
    try:
        code = errors.run_main(lambda: main(sys.argv[1:]))
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = _READER_HAS_GONE
    except SystemExit as ended:  # argparse's
        if isinstance(ended.code, str):
            raise
        sys.exit(_end_output(ended.code or 0))
    return _end_output(code)


def _end_output(code: int) -> int:
    """Write what is still to be written; the exit code, which says if nobody reads: `… | head` has seen enough."""
    try:
        if sys.stdout is not None:  # as it is after `>&-`
            sys.stdout.flush()
    except BrokenPipeError:  # Python would complain of it once more while exiting
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or _READER_HAS_GONE
    return code


def print_json(value: Any) -> None:
    """Print a value as JSON; paths, times and the like become text."""
    print(json.dumps(value, indent=2, default=str))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str] | None = None
) -> None:
    """Print rows of text below their columns' names.

    Args:
        columns: names, one a column.
        rows: cells, as many as there are columns.
        styles: rich style of a whole cell by its text, for example `{"fail": "red"}`; on a terminal only.
    """
    rows = [[visible(cell).replace("\n", " ") for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(columns, rows, styles or {})
    else:
        print(plain_table(columns, rows))


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    lines = [[name.upper() for name in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    Console().print(table)
