"""Recipes: TOML files of flags, by path or by the name of one that comes with the package.

Built in are the demo's (`rltrain/demo`) and one for each of many models (`rltrain/models`).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from rltrain.arguments import flags as flag_data
from rltrain.arguments.errors import UserError
from rltrain.arguments.flags import Flags

_FOLDERS = ("demo", "models")


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(_builtin())


def read_recipe(name: str, known: Collection[str]) -> Flags:
    """Flags of a recipe: a file, or the name of a built-in one, with or without `.toml`.

    Raises:
        UserError: there is no such recipe, or it can't be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return flag_data.from_toml(path.read_text(), str(path), known)
    builtin = _builtin()
    found = builtin.get(name.removesuffix(".toml"))
    if found is not None:
        return flag_data.from_toml(found.read_text(), f"@{name}", known)
    near = difflib.get_close_matches(name.removesuffix(".toml"), builtin, n=3) or sorted(builtin)
    raise UserError(f"@{name}: there is no such file, and no such built-in recipe; near are"
                    f" {', '.join(f'@{recipe}' for recipe in near)}.")  # fmt: skip


def _builtin() -> dict[str, Traversable]:
    package = resources.files("rltrain")
    return {
        entry.name.removesuffix(".toml"): entry
        for folder in _FOLDERS
        for entry in (package / folder).iterdir()
        if entry.name.endswith(".toml")
    }
