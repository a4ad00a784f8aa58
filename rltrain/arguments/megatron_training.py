"""The flags of a Megatron-LM on PYTHONPATH, whose `megatron.training.arguments` knows more than megatron-core does.

Where there is one, its flags decide what is known: those that fill a field which is handed on to megatron-core
work as the stored ones do, every other one that this trainer has no use for is refused by name.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rltrain.arguments.errors import UserError
from rltrain.arguments.megatron_config import HANDED_ON, ConfigFlag

_MODULE = Path("megatron/training/arguments.py")


@dataclass(frozen=True)
class MegatronLM:
    """A Megatron-LM that was found: its version, where it lies, and all its flags by name (without dashes)."""

    version: str
    root: Path
    flags: dict[str, argparse.Action]


@cache
def find_megatron_lm() -> MegatronLM | None:
    """The Megatron-LM that `import megatron.training` takes, or None; imports it, and torch, only if there is one.

    Raises:
        UserError: it is there and can't be imported.
    """
    root = next((Path(entry) for entry in sys.path if (Path(entry or ".") / _MODULE).is_file()), None)
    if root is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a page of kernels that are not there, on a login node
            arguments: Any = importlib.import_module("megatron.training.arguments")
            core: Any = importlib.import_module("megatron.core")
    except Exception as error:
        raise UserError(
            f"{root / _MODULE} is on PYTHONPATH, but importing it fails with {type(error).__name__}: {error}."
            " Take it off PYTHONPATH to use the stored list of megatron-core's flags, or install what it needs."
        ) from error
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    actions = {
        option.removeprefix("--"): action
        for option, action in parser._option_string_actions.items()
        if option.startswith("--")
    }
    return MegatronLM(core.__version__, root, actions)


def handed_on(megatron: MegatronLM) -> list[ConfigFlag]:
    """Its flags that fill a field of `HANDED_ON`."""
    found = []
    for name, action in megatron.flags.items():
        config = next((each for each, fields in HANDED_ON.items() if action.dest in fields), None)
        if config is not None:
            kind, choices = _kind(action), tuple(str(each) for each in action.choices or ())
            found.append(ConfigFlag(name, action.dest, config, kind, choices))
    return found


def _kind(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "off" if action.const is False else "on"
    kind = {int: "int", float: "float"}.get(action.type, "str")  # type: ignore[call-overload]
    return f"{kind}s" if action.nargs in ("+", "*") else kind
