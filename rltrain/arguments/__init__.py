"""Training flags: parse, resolve, check, store. Needs neither torch, megatron-core nor sglang.

`parse` turns flags into a `Config`, `dump` and `load` carry it through the run directory's `config.toml` to every
process of the job. What only `parse` needs is imported late: each of a job's processes imports this to `load`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from rltrain.arguments.config import Config, groups
from rltrain.arguments.declare import add_group
from rltrain.arguments.groups.critic import read_overrides, use_critic
from rltrain.arguments.slime_names import REFUSED, add_ignored_flags, remarks
from rltrain.run.errors import UserError, nearest
from rltrain.run.layout import RunLayout
from rltrain.run.toml_values import from_toml_values, read_table, to_toml_values

__all__ = ["Config", "UserError", "add_flags", "dump", "known_flags", "load", "parse", "remarks"]


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that a notebook and the command line get the same message."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, list | dict):  # may be the shared default: copy it
                setattr(found, name, copy.copy(value))
        return found, unknown


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every training flag to a parser."""
    from rltrain.arguments.engine_names import add_passthrough_flags
    from rltrain.arguments.megatron_names import add_config_flags, find_megatron_lm, handed_on

    megatron = find_megatron_lm()
    for group in groups().values():
        add_group(parser, group)
    add_config_flags(parser, handed_on(megatron) if megatron else ())
    add_ignored_flags(parser)
    add_passthrough_flags(parser)


def parse(argv: list[str]) -> Config:
    """Training flags, with slime's and Megatron's names, to a resolved configuration.

    Raises:
        UserError: an unknown flag (the message names the nearest), or values that contradict each other.
    """
    from rltrain.arguments.recipes import read_custom_config
    from rltrain.arguments.resolve import resolve

    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(explain_unknown(unknown[0], known_flags()))
    config = Config.of(args)
    if path := config.functions.custom_config_path:
        config = Config.from_values(config.values() | read_custom_config(path))
    return resolve(_apply_role_overrides(_take_secrets(config), parser))


def make_parser() -> argparse.ArgumentParser:
    """A parser of every training flag, which raises `UserError`. It is made once, which takes longer than to parse."""
    from rltrain.arguments.megatron_names import find_megatron_lm

    megatron = find_megatron_lm()
    return _parser_with(megatron.root if megatron else None)


@cache
def _parser_with(megatron_lm: Path | None) -> argparse.ArgumentParser:
    """One for each Megatron-LM whose flags `add_flags` finds."""
    parser = _Parser(allow_abbrev=False, add_help=False, argument_default=None)
    add_flags(parser)
    return parser


def _take_secrets(config: Config) -> Config:
    """Move `--wandb-key` to where W&B looks for it, so that it is stored nowhere."""
    if not config.tracking.wandb_key:
        return config
    os.environ["WANDB_API_KEY"] = config.tracking.wandb_key
    return replace(config, tracking=replace(config.tracking, wandb_key=None))


def _apply_role_overrides(config: Config, parser: argparse.ArgumentParser) -> Config:
    """Take in `--megatron-config-path`: the actor's values replace the run's, the critic's are kept aside."""
    path = config.critic.megatron_config_path
    if path is None:
        return config
    converters: dict[str, Any] = {
        action.dest: action.type if callable(action.type) else None for action in parser._actions
    }
    roles = read_overrides(path, config.values(), converters)
    if roles.get("critic") and not use_critic(config.algorithm):
        raise UserError(
            f"--megatron-config-path {path}: it has a critic, but only --advantage-estimator ppo trains one."
        )
    overrides = json.dumps(roles.get("critic", {}))
    return config.replace(**roles.get("actor", {}), critic_overrides=overrides)


def explain_unknown(flag: str, known: list[str]) -> str:
    """The reason why `flag` is refused, with the nearest known flag."""
    from rltrain.arguments.engine_names import RESERVED
    from rltrain.arguments.megatron_names import refusal

    name = flag.partition("=")[0]
    if name.lstrip("-") in REFUSED:
        return f"{name} is not supported: {REFUSED[name.lstrip('-')]}."
    if reason := refusal(name.removeprefix("--")):
        return reason
    for prefix, flags in RESERVED.items():
        if name.removeprefix(f"--{prefix}-") in flags:
            return f"{name} is set by the job itself and can't be given."
    if not name.startswith("-"):
        return f"unexpected argument {flag!r}: flags begin with --, recipes with @."
    # A typo is one or two letters. A flag of another version of Megatron or slime must not be taken for one of ours.
    near = nearest(name, known, cutoff=0.9 if len(name) > 8 else 0.8)  # of few letters, one is much
    return f"unknown flag {name}" + (f": did you mean {near}?" if near else "; see --help.")


def known_flags() -> list[str]:
    """Every training flag, with its dashes."""
    return sorted(make_parser()._option_string_actions)


def dump(config: Config) -> dict[str, Any]:
    """The configuration as TOML-able values by name; what is None by default is left out where it is None."""
    return to_toml_values(config.values(), Config().values())


def load(run_dir: Path) -> Config:
    """The configuration that `dump` stored as `[train]` in the run's `config.toml`."""
    layout = RunLayout(run_dir)
    config = Config.from_values(from_toml_values(read_table(layout, "train")))
    save = config.checkpoint.save or str(layout.checkpoints)
    return replace(config, checkpoint=replace(config.checkpoint, save=save))
