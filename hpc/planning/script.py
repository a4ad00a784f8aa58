"""Render batch scripts from `slurm_templates/`. Whatever a template prints is quoted unless marked as raw."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from hpc.planning.slurm_tables import Value
from rltrain.run.errors import UserError

TEMPLATE = "job.sbatch.j2"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[\w@%+=:,./\[\]&|*-]+", re.ASCII)


class _Raw(str):
    """Text that is already quoted."""


@dataclass(frozen=True)
class BatchScript:
    """The values for a template.

    Attributes:
        components: flags of sbatch, a mapping for each component of a heterogeneous job; one for other jobs.
        command: shell code that becomes the batch process.
        env: variables to export.
        setup: lines of shell that come before.
    """

    components: tuple[Mapping[str, Value], ...]
    command: str
    env: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()

    def text(self, template: Path | None = None) -> str:
        """The script, from a template of the user's or the built-in one.

        Raises:
            UserError: a value that can't be written, or a template that is missing or wrong.
        """
        return render(template or TEMPLATE, **vars(self))


def render(template: str | Path, **values: Any) -> str:
    """Text of a template; a variable that it uses and `values` lacks is an error.

    Raises:
        UserError: see `BatchScript.text`.
    """
    folders = [str(resources.files("slurm_templates"))]
    if isinstance(template, Path):
        folders.insert(0, str(template.parent))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        undefined=jinja2.StrictUndefined,
        finalize=_quote,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"sbatch": sbatch_value, "assigned": _assigned, "raw": _Raw}
    name = template.name if isinstance(template, Path) else template
    try:
        return environment.get_template(name).render(values)
    except jinja2.TemplateNotFound as error:
        raise UserError(f"--template {template}: there is no {error.name} in {', '.join(folders)}.") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"template {error.filename}, line {error.lineno}: {error.message}.") from None
    except jinja2.UndefinedError as error:
        given = ", ".join(values)
        raise UserError(f"template {template}: {error.message}. A template is given: {given}.") from None


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


def _assigned(value: Value) -> _Raw:
    return _Raw("" if value is True else f"={sbatch_value(value)}")


def _quote(value: Any) -> Any:
    if isinstance(value, _Raw | jinja2.Undefined):  # printing an Undefined raises
        return value
    text = str(value)
    if "\x00" in text:
        raise UserError(f"{text!r} has a NUL character, which the shell can't carry.")
    return shlex.quote(text)
