"""Flags as data: from a command line or a TOML recipe to one mapping, and back to a command line.

Everything is merged as flags, later ones winning, and parsed once by the one parser that knows them, so that
a recipe is checked exactly as a command line is. Pure functions.
"""

from __future__ import annotations

import datetime
import json
import re
import tomllib
from collections.abc import Collection, Mapping
from typing import Any

from rltrain.run.errors import UserError

# A flag's name without its dashes → its values as text; None takes an earlier mention back.
Flags = dict[str, list[str] | None]

_DAYS = re.compile(r"=\s*\d+-\d+(:\d+)*\s*$", re.MULTILINE)


def split(argv: list[str]) -> tuple[list[str], Flags]:
    """Recipe names (`@NAME` anywhere on the line, without the @) and flags of a command line.

    Raises:
        UserError: a word that belongs to no flag.
    """
    recipes: list[str] = []
    flags: Flags = {}
    values: list[str] | None = None
    for word in argv:
        if word.startswith("@"):
            recipes.append(word[1:])
        elif word.startswith("--") and word != "--":
            name, has_value, value = word[2:].partition("=")
            values = [value] if has_value else []
            flags[_name(name)] = values
        elif values is None:
            raise UserError(f"unexpected argument {word!r}: flags begin with --, recipes with @.")
        else:
            values.append(word)
    return recipes, flags


def from_toml(text: str, source: str, known: Collection[str] = ()) -> Flags:
    """Flags of a recipe. Tables only group: `[train] lr = 1e-3` is `--lr 0.001`.

    Names take dashes or underscores. `true` is the bare flag, `false` takes it back, or is its `no-…` form where one
    of the `known` flags is that; a list is several values. A table whose name is itself one of the `known` flags is
    that flag's value, as JSON. The table
    `[slurm]` keeps its names: `[slurm.srun] mpi = "pmix"` is `--slurm.srun.mpi pmix`.

    Raises:
        UserError: not TOML, or a value that no flag can have; the message names `source`.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = " Text, such as a time limit of days, needs quotes." if _DAYS.search(text) else ""
        raise UserError(f"{source} is not valid TOML: {error}.{hint}") from None
    return from_table(table, source, known)


def to_table(flags: Flags) -> dict[str, Any]:
    """A TOML table that `from_table` reads back as the same flags."""
    return {
        name: True if not values else values[0] if len(values) == 1 else values
        for name, values in flags.items()
        if values is not None
    }


def from_table(table: Mapping[str, Any], source: str, known: Collection[str] = ()) -> Flags:
    """See `from_toml`."""
    flags: Flags = {}
    for key, value in table.items():
        name = _name(key)
        if name == "slurm" and isinstance(value, dict):
            flags |= _dotted(value, name, source)
        elif isinstance(value, dict) and name not in known:
            flags |= from_table(value, source, known)
        elif isinstance(value, bool) and f"no-{name}" in known:
            flags |= {name: [], f"no-{name}": None} if value else {name: None, f"no-{name}": []}
        else:
            flags[name] = _values(value, f"{source}: {key}")
    return flags


def _dotted(table: Mapping[str, Any], prefix: str, source: str) -> Flags:
    flags: Flags = {}
    for key, value in table.items():
        # Names of environment variables keep their underscores.
        name = f"{prefix}.{key if prefix.endswith('.env') else _name(key)}"
        if isinstance(value, dict):
            flags |= _dotted(value, name, source)
        else:
            flags[name] = _values(value, f"{source}: {name}")
    return flags


def _values(value: Any, where: str) -> list[str] | None:
    if isinstance(value, bool):
        return [] if value else None
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, datetime.time):  # a time limit without quotes
        return [value.isoformat()]
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str | int | float) and item is not True for item in items):
        raise UserError(
            f"{where} = {value!r}: a flag's value is text, a number, true, false or a list of these."
        )
    return [str(item) for item in items]


def merge(*layers: Flags) -> Flags:
    """One mapping; a later layer's flag replaces an earlier one's. It comes last: of --x and --no-x the last counts."""
    merged: Flags = {}
    for layer in layers:
        merged = {name: values for name, values in merged.items() if name not in layer} | layer
    return merged


def to_argv(flags: Flags) -> list[str]:
    """A command line. A single value is joined by `=`, so that it may begin with a dash."""
    words: list[str] = []
    for name, values in flags.items():
        if values is not None and len(values) == 1:
            words.append(f"--{name}={values[0]}")
        elif values is not None:
            words += [f"--{name}", *values]
    return words


def _name(text: str) -> str:
    return text if text.startswith("slurm.env.") else text.replace("_", "-")
