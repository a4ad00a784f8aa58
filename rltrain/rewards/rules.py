"""Built-in reward functions, for `--rm-type`. Each has the signature of a custom one."""

from __future__ import annotations

import argparse

from rltrain.arguments.errors import UserError
from rltrain.sample import Sample


def exact_match(args: argparse.Namespace, sample: Sample) -> float:
    """1 if the response is the label, apart from white space around both; else 0."""
    return float(sample.response.strip() == str(sample.label).strip())


RULES = {"exact": "rltrain.rewards.rules.exact_match"}


def reward_function_path(args: argparse.Namespace, sample: Sample | None = None) -> str:
    """Import path of the reward function that the sample's metadata (`rm_type`) or the flags ask for.

    Raises:
        UserError: no reward asked for, or an `--rm-type` that does not exist.
    """
    if args.custom_rm_path:
        return args.custom_rm_path
    own = sample.metadata.get("rm_type") if sample is not None and isinstance(sample.metadata, dict) else None
    name, where = (own, "metadata rm_type") if own else (args.rm_type, "--rm-type")
    if not name:
        raise UserError(
            "no reward: give --custom-rm-path package.module.function, or --rm-type with one of "
            + ", ".join(sorted(RULES))
            + "."
        )
    if name not in RULES:
        raise UserError(f"{where} {name}: there is no such reward; there are {', '.join(sorted(RULES))}.")
    return RULES[name]
