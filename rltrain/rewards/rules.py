"""Built-in reward functions, for `--rm-type`. Each has the signature of a custom one."""

from __future__ import annotations

import argparse

from rltrain.arguments.errors import UserError
from rltrain.sample import Sample


def exact_match(args: argparse.Namespace, sample: Sample) -> float:
    """1 if the response is the label, apart from white space around both; else 0."""
    return float(sample.response.strip() == str(sample.label).strip())


RULES = {"exact": "rltrain.rewards.rules.exact_match"}


def reward_function_path(args: argparse.Namespace) -> str:
    """Import path of the reward function that the flags ask for.

    Raises:
        UserError: no reward asked for, or an `--rm-type` that does not exist.
    """
    if args.custom_rm_path:
        return args.custom_rm_path
    if not args.rm_type:
        raise UserError(
            "no reward: give --custom-rm-path package.module.function, or --rm-type with one of "
            + ", ".join(sorted(RULES))
            + "."
        )
    if args.rm_type not in RULES:
        raise UserError(
            f"--rm-type {args.rm_type}: there is no such reward; there are {', '.join(sorted(RULES))}."
        )
    return RULES[args.rm_type]
