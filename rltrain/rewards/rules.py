"""The built-in rewards, for `--rm-type`: which names there are, and which function each is."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from rltrain.arguments.errors import UserError
from rltrain.functions import load_function
from rltrain.rewards.answers import last_boxed
from rltrain.sample import Sample

RULES = {
    "exact": "rltrain.rewards.text.exact_match",
    "f1": "rltrain.rewards.text.f1",
    "regex": "rltrain.rewards.text.regex",
    "multiple_choice": "rltrain.rewards.text.multiple_choice",
    "gpqa": "rltrain.rewards.text.multiple_choice",
    "dapo": "rltrain.rewards.text.dapo",
    "math": "rltrain.rewards.mathematics.math",
    "deepscaler": "rltrain.rewards.mathematics.deepscaler",
    "reasoning_gym": "rltrain.rewards.gym.reasoning_gym",
    "remote_rm": "rltrain.rewards.remote.remote_rm",
}
_BOXED = "boxed_"


def reward_function_path(args: argparse.Namespace, sample: Sample | None = None) -> str:
    """Import path of the reward function that the sample's metadata (`rm_type`) or the flags ask for.

    Raises:
        UserError: no reward asked for, or an `--rm-type` that does not exist or lacks what it needs.
    """
    if args.custom_rm_path:
        return args.custom_rm_path
    name = reward_name(args, sample)
    if not name:
        raise UserError(
            "no reward: give --custom-rm-path package.module.function, or --rm-type with one of "
            + ", ".join(sorted(RULES))
            + "."
        )
    plain = name.removeprefix(_BOXED)
    if plain not in RULES:
        where = "--rm-type" if name == args.rm_type else "metadata rm_type"
        raise UserError(
            f"{where} {name}: there is no such reward; there are {', '.join(sorted(RULES))}, and each with"
            f" {_BOXED} before it."
        )
    if plain == "remote_rm" and not args.rm_url:
        raise UserError("--rm-type remote_rm needs --rm-url.")
    if plain == "dapo" and not args.reward_key:
        raise UserError("--rm-type dapo returns a dict: say --reward-key score (or acc).")
    return "rltrain.rewards.rules.boxed" if name != plain else RULES[plain]


def reward_name(args: argparse.Namespace, sample: Sample | None) -> str | None:
    """The `--rm-type` of a sample: its own, from its metadata, or the run's."""
    own = sample.metadata.get("rm_type") if sample is not None and isinstance(sample.metadata, dict) else None
    return own or args.rm_type


def boxed(args: argparse.Namespace, sample: Sample) -> Any:
    """`boxed_NAME`: the reward NAME of what stands in the response's last box; of nothing if there is none."""
    name = (reward_name(args, sample) or "").removeprefix(_BOXED)
    answer = dataclasses.replace(sample, response=last_boxed(sample.response) or "")
    return load_function(RULES[name], flag="--rm-type")(args, answer)
