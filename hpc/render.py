"""Render batch scripts from `slurm_templates/`. Whatever a template prints is quoted unless marked as raw."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from typing import Any

import jinja2

from rltrain.arguments.errors import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PLAIN = re.compile(r"[\w@%+=:,./\[\]&|*-]+", re.ASCII)


class _Raw(str):
    """Text that is shell code already."""


def render(template: str, **values: Any) -> str:
    """Text of a template; a variable that it uses and `values` lacks is an error."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        finalize=_quote,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["sbatch"] = sbatch_value
    environment.filters["raw"] = _Raw
    return environment.from_string((resources.files("slurm_templates") / template).read_text()).render(values)


def sbatch_value(value: Any) -> _Raw:
    r"""A value on an `#SBATCH` line.

    sbatch has a parser of its own: a backslash escapes even between single quotes, and an unquoted `#` begins
    a comment. So anything but plain characters is put between double quotes with `\` and `"` escaped.

    Raises:
        UserError: control characters, which can't be written on such a line.
    """
    text = str(value)
    if _CONTROL.search(text):
        raise UserError(f"{text!r} has control characters, which an #SBATCH line can't carry.")
    if _PLAIN.fullmatch(text):
        return _Raw(text)
    return _Raw('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')


def _quote(value: Any) -> Any:
    if isinstance(value, _Raw | jinja2.Undefined):  # printing an Undefined raises
        return value
    return shlex.quote(str(value))
