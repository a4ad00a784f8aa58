"""Any value in TOML: what TOML can't hold (null, keys that are not text, bytes) is stored as JSON beside the rest.

For `config.toml` of a run: `--custom-config-path` and flags with JSON may hold anything that YAML can, and every role
must find it as it was written.
"""

from __future__ import annotations

import base64
import datetime
import json
import tomllib
from collections.abc import Mapping
from typing import Any

from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout

KEY = "not_in_toml"  # the entry of config.toml that holds them, by name
_DATES: dict[str, Any] = {"datetime": datetime.datetime, "date": datetime.date, "time": datetime.time}
_TAG = ""  # the only key of an object that stands for something that JSON has not


def read_table(
    layout: RunLayout, name: str, advice: str = "", missing: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A table of a run's `config.toml`: "flags", "submit" or "train".

    Args:
        layout: of the run.
        name: of the table.
        advice: what to do about a damaged file, a sentence after a space.
        missing: what a file without this table says; None: nothing, it is damaged.

    Raises:
        UserError: the file is damaged.
        OSError: it can't be read now, which may pass.
    """
    try:
        table = tomllib.loads(layout.config.read_text()).get(name, missing)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        table, why = None, str(error)
    else:
        why = f"it has no table [{name}]"
    if not isinstance(table, dict):
        raise UserError(f"{layout.config} can't be read, so the run's flags are unknown: {why}.{advice}")
    return table


def to_toml_values(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values, sorted by name, with those that TOML can't hold under `KEY`.

    A None is left out where it is the default.

    Raises:
        TypeError: a value is an object that no file of settings can hold.
    """
    given = {
        name: value
        for name, value in sorted(values.items())
        if value is not None or defaults.get(name, _MISSING) is not None
    }
    stored = {name: value for name, value in given.items() if _fits(value)}
    others = {name: _encoded(value) for name, value in given.items() if name not in stored}
    return stored | ({KEY: json.dumps(others)} if others else {})


def from_toml_values(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse; what was left out stays out."""
    values = dict(stored)
    others = json.loads(values.pop(KEY, "{}"))
    return values | {name: _decoded(value) for name, value in others.items()}


_MISSING = object()


def _fits(value: Any) -> bool:
    """Whether TOML gives the value back as it is."""
    if isinstance(value, list):
        return all(map(_fits, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _fits(each) for key, each in value.items())
    return isinstance(value, str | int | float | datetime.date | datetime.time)


def _encoded(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list):
        return [_encoded(each) for each in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) and key != _TAG for key in value):
            return {key: _encoded(each) for key, each in value.items()}
        return {_TAG: ["dict", [[_encoded(key), _encoded(each)] for key, each in value.items()]]}
    if isinstance(value, datetime.date | datetime.time):
        return {_TAG: [type(value).__name__, value.isoformat()]}
    if isinstance(value, bytes):
        return {_TAG: ["bytes", base64.b64encode(value).decode()]}
    if isinstance(value, set):
        return {_TAG: ["set", [_encoded(each) for each in value]]}
    raise TypeError(f"{value!r:.100} is a {type(value).__name__}, which a TOML file can't hold")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {_TAG}:
        return {key: _decoded(each) for key, each in value.items()}
    kind, content = value[_TAG]
    if kind in _DATES:
        return _DATES[kind].fromisoformat(content)
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "set":
        return {_decoded(each) for each in content}
    return {_decoded(key): _decoded(each) for key, each in content}
