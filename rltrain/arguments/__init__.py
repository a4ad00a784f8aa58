"""Training flags: parse, resolve, check, store. Needs neither torch, megatron-core nor sglang.

`parse` turns flags into a namespace, `check_inputs` looks at the files that it names, `dump` and `load`
carry it through the run directory's `config.toml` to every process of the job.
"""

from __future__ import annotations

import argparse
import difflib
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from hpc.layout import RunLayout
from rltrain.arguments.algorithm_flags import read_custom_config
from rltrain.arguments.errors import UserError
from rltrain.arguments.inputs import check_inputs
from rltrain.arguments.megatron_flags import add_megatron_flags
from rltrain.arguments.passthrough import RESERVED, add_passthrough_flags
from rltrain.arguments.resolve import resolve
from rltrain.arguments.slime_flags import NOT_YET, add_slime_flags

__all__ = ["UserError", "add_flags", "check_inputs", "dump", "known_flags", "load", "parse"]


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that a notebook and the command line get the same message."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every training flag to a parser."""
    add_slime_flags(parser)
    add_megatron_flags(parser)
    add_passthrough_flags(parser)


def parse(argv: list[str]) -> argparse.Namespace:
    """Training flags to a resolved namespace with slime's and Megatron's names.

    Raises:
        UserError: an unknown flag (the message names the nearest), or values that can't be right.
    """
    parser = _Parser(allow_abbrev=False, add_help=False, argument_default=None)
    add_flags(parser)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(explain_unknown(unknown[0], known_flags()))
    if args.custom_config_path:
        vars(args).update(read_custom_config(args.custom_config_path))
    return resolve(args)


def explain_unknown(flag: str, known: list[str]) -> str:
    """Why `flag` is refused, and what may have been meant."""
    name = flag.partition("=")[0]
    if name.lstrip("-") in NOT_YET:
        return f"{name} is a flag of slime that this version does not support yet; remove it."
    for prefix, flags in RESERVED.items():
        if name.removeprefix(f"--{prefix}-") in flags:
            return f"{name} is set by the job itself and can't be given."
    if not name.startswith("-"):
        return f"unexpected argument {flag!r}: flags begin with --, recipes with @."
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"unknown flag {name}" + (f": did you mean {near[0]}?" if near else "; see --help.")


def known_flags() -> list[str]:
    """Every training flag, with its dashes."""
    parser = _Parser(add_help=False)
    add_flags(parser)
    return sorted(parser._option_string_actions)


def dump(args: argparse.Namespace) -> dict[str, Any]:
    """The namespace as TOML-able values; what is None is left out."""
    return {name: value for name, value in sorted(vars(args).items()) if value is not None}


def load(run_dir: Path) -> argparse.Namespace:
    """The namespace that `dump` stored as `[train]` in the run's `config.toml`."""
    layout = RunLayout(run_dir)
    stored = tomllib.loads(layout.config.read_text())["train"]
    parser = _Parser(add_help=False)
    add_flags(parser)
    args = parser.parse_args([])
    for name, value in stored.items():
        setattr(args, name, value)
    args.save = args.save or str(layout.checkpoints)
    return args
