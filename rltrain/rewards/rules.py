"""The built-in rewards, for `--rm-type`: which names there are, and which function each is."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from rltrain.arguments.config import Config
from rltrain.arguments.groups.functions import Functions
from rltrain.arguments.groups.rollout import Rewards
from rltrain.functions import load_function
from rltrain.rewards.text import last_boxed
from rltrain.run.errors import UserError
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


def reward_function_path(functions: Functions, rewards: Rewards, sample: Sample | None = None) -> str:
    """Import path of the reward function: the sample's `custom_rm_path`, the flags', or its metadata's `rm_type`.

    Raises:
        UserError: no reward asked for, or an `--rm-type` that does not exist or lacks what it needs.
    """
    if sample is not None and sample.custom_rm_path:
        return sample.custom_rm_path
    if functions.custom_rm_path:
        return functions.custom_rm_path
    name = reward_name(rewards.rm_type, sample)
    if not name:
        raise UserError(
            "no reward: give --custom-rm-path package.module.function, or --rm-type with one of "
            + ", ".join(sorted(RULES))
            + "; or have the generation function set sample.reward."
        )
    plain = name.removeprefix(_BOXED)
    if plain not in RULES:
        where = "--rm-type" if name == rewards.rm_type else "metadata rm_type"
        raise UserError(
            f"{where} {name}: there is no such reward; there are {', '.join(sorted(RULES))}, each also with {_BOXED}"
            " before it."
        )
    if plain == "remote_rm" and not rewards.rm_url:
        raise UserError("--rm-type remote_rm needs --rm-url.")
    if plain == "dapo" and not rewards.reward_key:
        raise UserError("--rm-type dapo returns a dict: give --reward-key score (or acc).")
    return "rltrain.rewards.rules.boxed" if name != plain else RULES[plain]


def asks_for_reward(config: Config) -> bool:
    """Whether the flags ask for a reward, or must: without one, only a generation function can set it."""
    given = config.functions.custom_rm_path or config.rewards.rm_type
    if config.agents.environment:
        return False
    return bool(given or not config.functions.custom_generate_function_path or config.agents.agent_command)


def reward_name(rm_type: str | None, sample: Sample | None) -> str | None:
    """The name of a sample's reward: its own, from its metadata, or the run's `--rm-type`."""
    own = sample.metadata.get("rm_type") if sample is not None and isinstance(sample.metadata, dict) else None
    return own or rm_type


def boxed(args: argparse.Namespace, sample: Sample) -> Any:
    """`boxed_NAME`: applies reward NAME to the content of the response's last box, or to an empty text without one."""
    name = (reward_name(args.rm_type, sample) or "").removeprefix(_BOXED)
    answer = dataclasses.replace(sample, response=last_boxed(sample.response) or "")
    return load_function(RULES[name], flag="--rm-type")(args, answer)
