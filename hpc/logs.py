"""Show the logs of a run's roles: the last lines of each, or everything new for as long as the run lives.

Of an attempt that failed the cause comes first.

With several logs each line begins with its role. `-f` continues across preemptions and restarts, and ends when the
run has ended.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import cli
from hpc.runs.find import find_run
from hpc.runs.log_files import ROLES, LogFile, find_logs, job_logs
from hpc.runs.state import RunEnd
from rltrain.run.errors import UserError
from rltrain.run.files import read_lines
from rltrain.run.layout import RunLayout
from rltrain.run.terminal import safe_line

EXAMPLE = "python -m hpc.logs demo -f --role trainer"
LINES_OF_ONE, LINES_OF_MANY = 50, 10

_POLL_SECONDS = 0.25
_LOG_FOLLOWS = re.compile(r"\. Its log, .*, ends:$")  # hpc.supervisor.roles


@dataclass(frozen=True)
class LogLine:
    """A line of a log: which attempt and role wrote it. `text` has no line end."""

    attempt: int | None
    name: str
    text: str


@dataclass(frozen=True)
class Selection:
    """The choice of logs: one role or all, one index or all, one attempt or the newest."""

    role: str | None = None
    index: int | None = None
    attempt: int | None = None


def last_lines(
    run: str | Path,
    role: str | None = None,
    index: int | None = None,
    attempt: int | None = None,
    n: int | None = None,
    runs_dir: str | Path = "runs",
) -> list[LogLine]:
    """The last `n` lines of each chosen log, log by log (None: 50 of a single log, 10 each of several).

    Where all roles are chosen and the attempt failed, the first line says why, under the name "cause".

    Raises:
        UserError: there is no such run, attempt or role; the message names those that there are.
    """
    layout, selection = find_run(run, Path(runs_dir)), Selection(role, index, attempt)
    files = choose_logs(layout, selection)
    count = n if n is not None else LINES_OF_ONE if len(files) == 1 else LINES_OF_MANY
    lines = [LogLine(file.attempt, file.name, line) for file in files for line in file.tail(count)]
    return [*_cause(layout, selection, files), *lines]


def follow(
    run: str | Path,
    role: str | None = None,
    index: int | None = None,
    attempt: int | None = None,
    n: int | None = None,
    runs_dir: str | Path = "runs",
) -> Iterator[LogLine]:
    """`last_lines`, then every new line, attempt after attempt, until the run has ended.

    With an `attempt` given it ends with that attempt.
    """
    layout = find_run(run, Path(runs_dir))
    return _follow(layout, Selection(role, index, attempt), n, RunEnd(layout))


def choose_logs(layout: RunLayout, selection: Selection) -> list[LogFile]:
    """The logs that exist now; those of the job itself if no attempt has begun.

    Raises:
        UserError: the attempt or role does not exist.
    """
    attempts = layout.attempts()
    if not attempts and selection == Selection() and (files := job_logs(layout)):
        return files
    if not attempts:
        raise UserError(
            f"{layout.name} has no logs yet: no attempt has begun. `python -m hpc.status` shows why."
        )
    attempt = attempts[-1] if selection.attempt is None else selection.attempt
    if attempt not in attempts:
        only = "there is only attempt" if len(attempts) == 1 else "there are attempts"
        there = ", ".join(map(str, attempts))
        raise UserError(f"{layout.name} has no attempt {attempt}: {only} {there}; attempts count from 0.")
    files = find_logs(layout, attempt)
    # After a good end srun says only that its tasks were ended.
    if selection.role is None and _ended_well(layout, attempt):
        files = [file for file in files if file.role != "srun"]
    chosen = [file for file in files if file.matches(selection.role, selection.index)]
    if not chosen:
        wanted = (selection.role or "any role") + ("" if selection.index is None else f" {selection.index}")
        there = ", ".join(file.name for file in files) or "none yet"
        raise UserError(f"attempt {attempt} of {layout.name} has no log of {wanted}; it has: {there}.")
    return chosen


def _ended_well(layout: RunLayout, attempt: int) -> bool:
    return any(event.get("state") in ("finished", "stopped") for event in _ends(layout, attempt))


def _ends(layout: RunLayout, attempt: int) -> Iterator[dict[str, Any]]:
    return (
        event
        for event in read_lines(layout.events)
        if event.get("kind") == "attempt_finished" and event.get("attempt") == attempt
    )


def _cause(layout: RunLayout, selection: Selection, files: list[LogFile]) -> list[LogLine]:
    """Why the attempt failed, in one line: the logs' own lines follow anyway."""
    attempt = files[0].attempt if files else None
    if selection.role is not None or attempt is None:
        return []
    failed = [event for event in _ends(layout, attempt) if event.get("state") == "failed"]
    first = str(failed[-1].get("reason") or "").partition("\n")[0] if failed else ""
    return [LogLine(attempt, "cause", _LOG_FOLLOWS.sub("", first))] if first else []


def _follow(layout: RunLayout, selection: Selection, n: int | None, end: RunEnd) -> Iterator[LogLine]:
    known = {file.path: file for file in _logs_to_follow(layout, selection)}
    shown = choose_logs(layout, selection) if layout.attempts() else []
    count = n if n is not None else LINES_OF_ONE if len(shown) == 1 else LINES_OF_MANY
    yield from _cause(layout, selection, shown)
    for file in known.values():
        if file in shown:
            yield from _lines(file, file.tail(count))
        else:
            file.skip()
    over = False
    while not over:
        over = end.is_over(selection.attempt)  # asked before reading: what was written until then is shown
        for file in _logs_to_follow(layout, selection):
            file = known.setdefault(file.path, file)
            yield from _lines(file, file.read_rest() if over else file.read_new())
        if not over:
            time.sleep(_POLL_SECONDS)


def _lines(file: LogFile, lines: list[str]) -> Iterator[LogLine]:
    return (LogLine(file.attempt, file.name, line) for line in lines)


def _logs_to_follow(layout: RunLayout, selection: Selection) -> list[LogFile]:
    attempts = layout.attempts() if selection.attempt is None else [selection.attempt]
    return [
        file
        # The one before the newest too: it may have had something to say since it was last read.
        for attempt in attempts[-2:]
        for file in find_logs(layout, attempt)
        if file.matches(selection.role, selection.index)
    ]


class Printer:
    """Prints lines: with their role if there are several logs, harmless if they go to a terminal."""

    def __init__(self, with_names: bool) -> None:
        self._with_names, self._is_terminal = with_names, sys.stdout.isatty()
        self._attempt: int | None = None

    def print(self, line: LogLine) -> None:
        """Print one."""
        if line.attempt != self._attempt and self._attempt is not None:
            print(f"=== attempt {line.attempt} ===")
        self._attempt = line.attempt
        text = safe_line(line.text) if self._is_terminal else line.text
        print(f"[{line.name}] {text}" if self._with_names else text, flush=True)


def main(argv: list[str]) -> int:
    """The command line; returns an exit code."""
    parser = cli.make_parser("hpc.logs", __doc__, EXAMPLE)
    add = parser.add_argument
    add("run", metavar="RUN", help="name or directory")
    add("-f", "--follow", action="store_true", help="also show new lines, until the run has ended")
    add("--role", choices=ROLES, help="only this role's logs")
    add("--index", type=int, metavar="I", help="only the role's process with this number")
    add("--attempt", type=int, metavar="N", help="of this attempt (default: the newest)")
    add("-n", type=int, metavar="N", help="last lines of each log (default: 50, of several logs 10 each)")
    cli.add_runs_dir(parser)
    args = parser.parse_args(argv)
    if args.n is not None and args.n < 0:
        raise UserError(f"-n {args.n}: the number of lines can't be negative.")
    show = follow if args.follow else last_lines
    printer = Printer(with_names=args.role is None or args.index is None)
    for line in show(args.run, args.role, args.index, args.attempt, args.n, args.runs_dir):
        printer.print(line)
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
