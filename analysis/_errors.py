"""What can be wrong with a run directory, told to people."""

from __future__ import annotations

import warnings


class RunNotFoundError(FileNotFoundError):
    """The path holds no run; the message lists the runs nearby."""


class DamagedFileError(ValueError):
    """A file of the run cannot be read; the message names it."""


class DamagedFileWarning(UserWarning):
    """A file, or a line of it, cannot be read and was left out of the frame."""


def damaged(where: object, reason: str, *, strict: bool) -> None:
    """Name the damaged file `where` in a warning, or in an error if `strict`.

    Raises:
        DamagedFileError: if `strict`.
    """
    if strict:
        raise DamagedFileError(f"{where} is damaged: {reason}")
    message = f"{where} is damaged and left out: {reason}. load_run(..., strict=True) makes this an error."
    warnings.warn(message, DamagedFileWarning, stacklevel=2)
