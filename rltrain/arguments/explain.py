"""Where every value of the resolved configuration comes from, as TOML that is itself a recipe.

Sources: `flag` (the command line), `recipe @NAME`, `config.json` (the Hugging Face model), `worked out` from other
flags, `default`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain import arguments
from rltrain.arguments import flags as flag_data
from rltrain.arguments.errors import UserError
from rltrain.arguments.flags import Flags
from rltrain.arguments.hf_config import check_hf_config
from rltrain.arguments.ignored_flags import remarks
from rltrain.arguments.inputs import read_hf_config
from rltrain.arguments.megatron_config import snapshot_version
from rltrain.arguments.megatron_training import find_megatron_lm
from rltrain.arguments.model_flags import check_model_flags, megatron_shape
from rltrain.arguments.recipes import read_recipe

_HIDDEN = ("api-key", "wandb-key")


@dataclass(frozen=True)
class Value:
    """One line: a flag without dashes, its value as TOML has it (None: not set), and where it comes from."""

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Configuration:
    """Everything that a command line says and implies."""

    args: argparse.Namespace
    values: list[Value]
    remarks: list[str]


def configuration(argv: Sequence[str], not_ours: Collection[str] = ()) -> Configuration:
    """Read `@recipe` words and flags, resolve them, and look where each value comes from.

    Args:
        argv: A command line.
        not_ours: Options, without dashes, of the program that starts the job: passed over.

    Raises:
        UserError: they can't be right; the message says which, and why.
    """
    flags, sources = _read(argv, not_ours)
    words = flag_data.to_argv(flags)
    args = arguments.parse(words)
    parser = arguments.make_parser()
    given = parser.parse_args(words)
    config, notes = _hf_config(args)
    if config:
        check_model_flags(args, config, sources)
        check_hf_config(config, args)
    values = [
        value
        for action in _actions(parser)
        for value in _values(action, args, given, parser, sources, config)
    ]
    return Configuration(args, values, [*remarks(args), *notes])


def to_toml(found: Configuration) -> str:
    """The values, one a line, each with its source as a comment; values that are not set are left out."""
    megatron = find_megatron_lm()
    flags_of = f"Megatron {megatron.version} at {megatron.root}" if megatron else snapshot_version()
    lines = [f"# Megatron's flags are those of {flags_of}"]
    lines += [f"# {remark}" for remark in found.remarks]
    for each in found.values:
        if each.value is not None and each.value != []:
            lines.append(f"{each.name} = {_toml(each)}  # {each.source}")
    return "\n".join(lines) + "\n"


def _read(argv: Sequence[str], not_ours: Collection[str]) -> tuple[Flags, dict[str, str]]:
    recipes, given = flag_data.split(list(argv))
    known = [option.removeprefix("--") for option in arguments.known_flags()] + list(not_ours)
    layers = [(f"recipe @{name}", read_recipe(name, known)) for name in recipes] + [("flag", given)]
    merged: Flags = {}
    sources: dict[str, str] = {}
    for source, flags in layers:
        for name, values in flags.items():
            if name in not_ours or name.startswith("slurm."):
                continue
            merged[name], sources[name] = values, source
    return merged, {name: source for name, source in sources.items() if merged[name] is not None}


def _hf_config(args: argparse.Namespace) -> tuple[dict[str, Any] | None, list[str]]:
    directory = Path(args.hf_checkpoint)
    if not directory.is_dir():
        return None, [
            f"--hf-checkpoint {directory} is not on this machine: the model's shape was not checked"
        ]
    return read_hf_config(directory, without_weights=True), []


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """One for each flag, without further spellings of it."""
    return [action for action in parser._actions if action.option_strings]


def _values(
    action: argparse.Action,
    args: argparse.Namespace,
    given: argparse.Namespace,
    parser: argparse.ArgumentParser,
    sources: Mapping[str, str],
    config: Mapping[str, Any] | None,
) -> list[Value]:
    names = [option.removeprefix("--") for option in action.option_strings]
    name = next((each for each in names if each in sources), names[0])
    source = sources.get(name)
    if (
        action.default is argparse.SUPPRESS
    ):  # handed on to the engine, the router or megatron-core, or ignored
        return [Value(name, _handed_on(action, name, args), source)] if source else []
    value = getattr(args, action.dest)
    if source is None and value is None and config is not None and name in (shape := megatron_shape(config)):
        expected, key = shape[name]
        return [Value(name, expected, f"config.json: {key}")]
    if source is None:
        source = "default" if value == getattr(given, action.dest) else "worked out"
    if isinstance(action.const, bool):
        value = None if value is None else value == action.const
    return [Value(name, value, source)]


def _handed_on(action: argparse.Action, name: str, args: argparse.Namespace) -> Any:
    if action.nargs == 0:
        return True
    for prefix in ("sglang", "router"):
        if action.dest.startswith(f"{prefix}_"):
            return getattr(args, prefix)[action.dest.removeprefix(f"{prefix}_")]
    config, _, field = action.dest.partition(".")
    return args.megatron[config][field] if field else None


def _toml(each: Value) -> str:
    if each.name.endswith(_HIDDEN):
        return '"***"'
    value = json.dumps(each.value) if isinstance(each.value, dict) else each.value
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False) if all(map(_is_plain, value)) else json.dumps(str(value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return json.dumps(value)
    return json.dumps(value, ensure_ascii=False)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


__all__ = ["Configuration", "UserError", "Value", "configuration", "to_toml"]
