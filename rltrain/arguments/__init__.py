"""Training flags: parse, resolve, check, store. Needs neither torch, megatron-core nor sglang.

`parse` turns flags into a namespace, `check_inputs` looks at the files that it names, `dump` and `load`
carry it through the run directory's `config.toml` to every process of the job.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from hpc.layout import RunLayout
from rltrain.arguments.config_file import read_custom_config
from rltrain.arguments.critic_flags import apply_role_overrides
from rltrain.arguments.errors import UserError
from rltrain.arguments.ignored_flags import add_ignored_flags, remarks
from rltrain.arguments.inputs import check_inputs
from rltrain.arguments.megatron_config import add_config_flags, refused_flags
from rltrain.arguments.megatron_flags import add_megatron_flags
from rltrain.arguments.megatron_training import find_megatron_lm, handed_on
from rltrain.arguments.model_flags import add_model_flags
from rltrain.arguments.passthrough import RESERVED, add_passthrough_flags
from rltrain.arguments.resolve import resolve
from rltrain.arguments.slime_flags import NOT_YET, add_slime_flags

__all__ = ["UserError", "add_flags", "check_inputs", "dump", "known_flags", "load", "parse", "remarks"]


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that a notebook and the command line get the same message."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every training flag to a parser."""
    megatron = find_megatron_lm()
    add_slime_flags(parser)
    add_megatron_flags(parser)
    add_model_flags(parser)
    add_config_flags(parser, handed_on(megatron) if megatron else ())
    add_ignored_flags(parser)
    add_passthrough_flags(parser)


def parse(argv: list[str]) -> argparse.Namespace:
    """Training flags to a resolved namespace with slime's and Megatron's names.

    Raises:
        UserError: an unknown flag (the message names the nearest), or values that can't be right.
    """
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(explain_unknown(unknown[0], known_flags()))
    if args.custom_config_path:
        vars(args).update(read_custom_config(args.custom_config_path))
    take_secrets(args)
    apply_role_overrides(args, parser)
    return resolve(args)


def make_parser() -> argparse.ArgumentParser:
    """A parser of every training flag, which raises `UserError`."""
    parser = _Parser(allow_abbrev=False, add_help=False, argument_default=None)
    add_flags(parser)
    return parser


def take_secrets(args: argparse.Namespace) -> None:
    """Move `--wandb-key` to where W&B looks for it, so that it is stored nowhere."""
    if args.wandb_key:
        os.environ["WANDB_API_KEY"], args.wandb_key = args.wandb_key, None


def explain_unknown(flag: str, known: list[str]) -> str:
    """Why `flag` is refused, and what may have been meant."""
    name = flag.partition("=")[0]
    if name.lstrip("-") in NOT_YET:
        return f"{name} is a flag of slime that this version does not support yet; remove it."
    megatron = find_megatron_lm()
    if megatron and name.lstrip("-") in megatron.flags:
        return (
            f"{name} is a flag of Megatron {megatron.version} ({megatron.root}) that this trainer does not"
            " support; remove it."
        )
    if name.lstrip("-") in refused_flags():
        return f"{name} is a flag of Megatron that this trainer does not support; remove it."
    for prefix, flags in RESERVED.items():
        if name.removeprefix(f"--{prefix}-") in flags:
            return f"{name} is set by the job itself and can't be given."
    if not name.startswith("-"):
        return f"unexpected argument {flag!r}: flags begin with --, recipes with @."
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"unknown flag {name}" + (f": did you mean {near[0]}?" if near else "; see --help.")


def known_flags() -> list[str]:
    """Every training flag, with its dashes."""
    return sorted(make_parser()._option_string_actions)


def dump(args: argparse.Namespace) -> dict[str, Any]:
    """The namespace as TOML-able values; what is None is left out."""
    return {name: value for name, value in sorted(vars(args).items()) if value is not None}


def load(run_dir: Path) -> argparse.Namespace:
    """The namespace that `dump` stored as `[train]` in the run's `config.toml`."""
    layout = RunLayout(run_dir)
    stored = tomllib.loads(layout.config.read_text())["train"]
    args = make_parser().parse_args([])
    for name, value in stored.items():
        setattr(args, name, value)
    args.save = args.save or str(layout.checkpoints)
    return args
