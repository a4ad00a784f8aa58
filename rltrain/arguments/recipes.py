"""Files of flags: recipes (TOML), by path or by a name that comes with the package; settings that a flag names.

Built in are the demo's (`rltrain/demo`) and one for each of many models (`rltrain/models`).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from rltrain.arguments import flags as flag_data
from rltrain.arguments.flags import Flags
from rltrain.run.errors import UserError, nearest_few

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_FOLDERS = ("demo", "models")

# Options of `python -m hpc.submit` itself, which a recipe may hold too: where and how the job is started.
SUBMIT_OPTIONS = frozenset({
    *("name", "runs-dir", "dry-run", "share", "sweep", "sweep-parallel", "max-engine-restarts", "partition", "nodes"),
    *("placement", "account", "qos", "time", "gpu-type", "after", "detach", "test-only", "template"),
    *("max-restarts", "max-failures", "chain"),
})  # fmt: skip


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
        return flag_data.from_toml(_read_utf8(path), str(path), known)
    builtin = _builtin()
    found = builtin.get(name.removesuffix(".toml"))
    if found is not None:
        return flag_data.from_toml(found.read_text(), f"@{name}", known)
    if path.is_dir():
        raise UserError(
            f"@{name}: it is a directory; give the recipe in it, such as @{path / 'recipe.toml'}."
        )
    beside = [str(file) for file in path.parent.glob("*.toml")]
    near = nearest_few(str(path), beside, 2) + nearest_few(name.removesuffix(".toml"), builtin, 3)
    hint = f"near are {', '.join(f'@{recipe}' for recipe in near)}" if near else "--help lists those"
    raise UserError(f"@{name}: there is no such file, and no such built-in recipe; {hint}.")


def _read_utf8(path: Path) -> str:
    """The text of a file that a person wrote, perhaps with a byte order mark.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: it is not text in UTF-8. Save it as UTF-8.") from None


def _builtin() -> dict[str, Traversable]:
    from importlib import resources  # imported late, because every process of a job imports this module

    package = resources.files("rltrain")
    return {
        entry.name.removesuffix(".toml"): entry
        for folder in _FOLDERS
        for entry in (package / folder).iterdir()
        if entry.name.endswith(".toml")
    }


def read_config_file(path: str, flag: str) -> dict[str, object]:
    """The settings in a file; its suffix tells the format.

    Raises:
        UserError: it can't be read, or holds no names with values.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "it is a directory; give the file in it" if file.is_dir() else "there is no such file"
        raise UserError(f"{flag} {path}: {what}.")
    try:
        text = _read_utf8(file)
        if file.suffix == ".toml":
            settings = tomllib.loads(text)
        elif file.suffix == ".json":
            settings = json.loads(text)
        else:
            import yaml  # type: ignore[import-untyped]

            settings = yaml.safe_load(text)
    except UserError:
        raise
    except ImportError:
        raise UserError(f"{flag} {path}: YAML needs PyYAML; write it as TOML or JSON.") from None
    except Exception as error:
        raise UserError(f"{flag} {path}: {type(error).__name__}: {error}.") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"{flag} {path}: it must hold names with values.")
    return settings


def read_custom_config(path: str) -> dict[str, object]:
    """The settings of `--custom-config-path`, which become attributes of `args`.

    Raises:
        UserError: as for `read_config_file`.
    """
    settings = read_config_file(path, "--custom-config-path")
    return {name.replace("-", "_"): value for name, value in settings.items()}
