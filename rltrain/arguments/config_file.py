"""Files of settings that a flag names: TOML, JSON or YAML."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from rltrain.arguments.errors import UserError


def read_config_file(path: str, flag: str) -> dict[str, object]:
    """The settings in a file; its name says which language it is in.

    Raises:
        UserError: it can't be read, or holds no names with values.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text()
        if file.suffix == ".toml":
            settings = tomllib.loads(text)
        elif file.suffix == ".json":
            settings = json.loads(text)
        else:
            import yaml  # type: ignore[import-untyped]

            settings = yaml.safe_load(text)
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
