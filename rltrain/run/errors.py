"""Errors for people, and what they make of an exit code: every command and every role of the job ends through here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from rltrain.run.terminal import safe_text

EXIT_USAGE = 2  # bad input to a command
EXIT_NO_SUPERVISOR = 74  # a role has got no answer from its supervisor, which is not the role's failure
EXIT_REQUEUE = 75  # a role stopped with a checkpoint and wants to run again
EXIT_NEVER_RESTART = 93  # a role would fail the same way if it ran again
EXIT_INTERRUPTED = 130  # Ctrl-C

# What commands meet in places that a person names, or that belong to others.
_WHAT_IS_WRONG = {
    PermissionError: "you may not read or write this; it is another user's, or its file system is read-only.",
    NotADirectoryError: "a part of this path is a file where a directory is needed.",
    IsADirectoryError: "this is a directory where a file is needed.",
    FileExistsError: "something else already exists at this path.",
}
_OF_PLACES = tuple(_WHAT_IS_WRONG)


class NoSupervisorError(OSError):
    """The supervisor does not answer: it is gone, or waits for the run's disk."""


class UserError(Exception):
    """Bad input. The message is one paragraph: what is wrong, where, and what to do."""


def run_main(
    main: Callable[[], int | None],
    bad_input: int = EXIT_USAGE,
    kinds: type[Exception] | tuple[type[Exception], ...] = UserError,
) -> int:
    """Run a program's `main`; returns its exit code.

    Args:
        main: returns an exit code, or None for 0.
        bad_input: exit code for an error of `kinds`, which is printed as one line, `error: …`, to stderr.
        kinds: errors that mean: the person who asked can fix this.
    """
    try:
        return main() or 0
    except NoSupervisorError as error:
        print(f"error: {safe_text(str(error))}", file=sys.stderr, flush=True)
        return EXIT_NO_SUPERVISOR
    except kinds as error:
        print(f"error: {safe_text(str(error))}", file=sys.stderr, flush=True)
        return bad_input
    except _OF_PLACES as error:
        if bad_input != EXIT_USAGE or error.filename is None:  # a role of a job: its traceback says more
            raise
        place = safe_text(str(error.filename))
        print(f"error: {place}: {_WHAT_IS_WRONG[type(error)]}", file=sys.stderr, flush=True)
        return bad_input


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `known` that looks most like a mistyped `word`; None if all differ too much.

    Args:
        word: as typed.
        known: what it could be.
        cutoff: how alike they must be, from 0 to 1 (see `difflib.get_close_matches`).
    """
    return next(iter(nearest_few(word, known, 1, cutoff)), None)


def nearest_few(word: str, known: Iterable[str], count: int, cutoff: float = 0.6) -> list[str]:
    """The `count` of `known` that look most like `word`, or fewer; see `nearest`."""
    import difflib  # every process of a job imports this module, few have a word to look for

    return difflib.get_close_matches(word, list(known), n=count, cutoff=cutoff)
