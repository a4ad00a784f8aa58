"""Errors and warnings of reading: no such run, nothing of the kind in it, a damaged file."""

from __future__ import annotations

import warnings

from rltrain.run.errors import UserError
from rltrain.run.terminal import visible


class RunNotFoundError(UserError, FileNotFoundError):
    """The path holds no run; the message lists the runs nearby."""


class NotInRunError(UserError, ValueError):
    """The run has no such step, sample or column; the message names those that it has."""


class DamagedFileError(UserError, ValueError):
    """A file of the run cannot be read; the message names it."""


class DamagedFileWarning(UserWarning):
    """A file, or a line of it, cannot be read and was left out of the frame."""


def damaged(where: object, reason: str, *, strict: bool) -> None:
    """Name the damaged file `where` in a warning, or in an error if `strict`.

    Raises:
        DamagedFileError: if `strict`.
    """
    reason = visible(reason)
    if strict:
        raise DamagedFileError(f"{where} is damaged: {reason}")
    message = f"{where} is damaged and left out: {reason}. load_run(..., strict=True) makes this an error."
    warnings.warn(message, DamagedFileWarning, stacklevel=2)
