"""Show the source of every value of the resolved configuration, as TOML that is itself a recipe.

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
from rltrain.arguments.config import Config
from rltrain.arguments.flags import Flags
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.model import Model
from rltrain.arguments.groups.parallel import Parallel
from rltrain.arguments.hf_config import check_hf_config
from rltrain.arguments.megatron_names import flags_used
from rltrain.arguments.model_flags import (
    check_lora,
    check_model_flags,
    check_mtp,
    check_quantised,
    megatron_shape,
)
from rltrain.arguments.recipes import read_recipe
from rltrain.arguments.slime_names import remarks
from rltrain.models.directory import read_hf_config
from rltrain.run.errors import UserError

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

    config: Config
    values: list[Value]
    remarks: list[str]


def configuration(argv: Sequence[str], not_ours: Collection[str] = ()) -> Configuration:
    """Read `@recipe` words and flags, resolve them, and find the source of each value.

    Args:
        argv: A command line.
        not_ours: Options, without dashes, of the program that starts the job; they are skipped.

    Raises:
        UserError: the flags are wrong; the message says which ones and why.
    """
    flags, sources = _read(argv, not_ours)
    words = flag_data.to_argv(flags)
    config = arguments.parse(words)
    parser = arguments.make_parser()
    given = Config.of(parser.parse_args(words)).values()
    hf_config, notes = _hf_config(config.model.hf_checkpoint)
    if hf_config:
        check_model_flags(config.shape, hf_config, config.model.hf_checkpoint, sources)
        check_hf_config(hf_config, config.parallel, config.model.hf_checkpoint)
        check_quantised(hf_config, config)
        check_lora(hf_config, config.lora)
        check_mtp(hf_config, config.mtp, config.model.hf_checkpoint)
    values = [
        value for action in _actions(parser) for value in _values(action, config, given, sources, hf_config)
    ]
    notes = [*remarks(config), *notes, *_left_to_submit(config.model, config.parallel)]
    return Configuration(config, values, notes)


def to_toml(found: Configuration) -> str:
    """One value per line, with its source as a comment. Values that are not set are left out."""
    lines = [f"# Megatron's flags come from {flags_used()}"]
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
            merged.pop(name, None)
            sources.pop(name, None)  # of --x and --no-x the later one counts
            merged[name], sources[name] = values, source
    return merged, {name: source for name, source in sources.items() if merged[name] is not None}


def _left_to_submit(model: Model, parallel: Parallel) -> list[str]:
    """What is decided where the job's GPUs are known (`hpc.submitting.precision`)."""
    given = {"bf16": model.bf16, "use-distributed-optimizer": parallel.use_distributed_optimizer}
    words = "not given: true where the trainer has GPUs, false on a CPU; submit says which, and stores it"
    return [f"{name} is {words}" for name, value in given.items() if value is None]


def _hf_config(hf_checkpoint: str) -> tuple[dict[str, Any] | None, list[str]]:
    directory = Path(hf_checkpoint)
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
    config: Config,
    given: Mapping[str, Any],
    sources: Mapping[str, str],
    hf_config: Mapping[str, Any] | None,
) -> list[Value]:
    names = [option.removeprefix("--") for option in action.option_strings]
    given_names = [each for each in sources if each in names]
    name = given_names[-1] if given_names else names[0]
    source = sources.get(name)
    if isinstance(action, argparse.BooleanOptionalAction):
        name = names[0]
    if (
        action.default is argparse.SUPPRESS
    ):  # handed on to the engine, the router or megatron-core, or ignored
        return [Value(name, _handed_on(action, name, config.engines, config.model), source)] if source else []
    value = config.values()[action.dest]
    if (
        source is None
        and value is None
        and hf_config is not None
        and name in (shape := megatron_shape(hf_config))
    ):
        expected, key = shape[name]
        return [Value(name, expected, f"config.json: {key}")]
    if source is None:
        source = "default" if value == given[action.dest] else "worked out"
    if isinstance(action.const, bool):
        value = None if value is None else value == action.const
    return [Value(name, value, source)]


def _handed_on(action: argparse.Action, name: str, engines: Engines, model: Model) -> Any:
    if action.nargs == 0:
        return True
    for prefix, handed in (("sglang_", engines.sglang), ("router_", engines.router)):
        if action.dest.startswith(prefix):
            return handed[action.dest.removeprefix(prefix)]
    kind, _, field = action.dest.partition(".")
    return model.megatron[kind][field] if field else None


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
