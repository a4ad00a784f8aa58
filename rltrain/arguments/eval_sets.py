"""Evaluation sets: those of `--eval-prompt-data`, and those of `--eval-config`, each with settings of its own.

The file of `--eval-config` (YAML, TOML or JSON) is slime's: `eval.defaults` for all sets, `eval.datasets` a list.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from rltrain.arguments.config_file import read_custom_config
from rltrain.arguments.errors import UserError

# What a set may say for itself, and the attribute of args that it has otherwise.
SETTINGS = {
    "n_samples_per_eval_prompt": "n_samples_per_eval_prompt",
    "temperature": "eval_temperature",
    "top_p": "eval_top_p",
    "top_k": "eval_top_k",
    "max_response_len": "eval_max_response_len",
    "max_prompt_len": "eval_max_prompt_len",
    "max_context_len": "eval_max_context_len",
    "min_new_tokens": "eval_min_new_tokens",
    "input_key": "eval_input_key",
    "label_key": "eval_label_key",
    "metadata_key": "metadata_key",
    "tool_key": "eval_tool_key",
    "reward_key": "eval_reward_key",
    "rm_type": "rm_type",
    "custom_rm_path": "custom_rm_path",
    "custom_generate_function_path": "custom_generate_function_path",
    "apply_chat_template": "apply_chat_template",
    "stop": "rollout_stop",
    "stop_token_ids": "rollout_stop_token_ids",
}


def resolve_eval_sets(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All sets: `name`, `path` (absolute) and every setting that is not None.

    Raises:
        UserError: a set without name or file, a name twice or one that can't be a directory, an unknown setting.
    """
    words = args.eval_prompt_data or []
    if len(words) % 2:
        raise UserError(
            f"--eval-prompt-data takes pairs of a name and a file, but {len(words)} words were given."
        )
    given = [{"name": name, "path": path} for name, path in zip(words[::2], words[1::2], strict=True)]
    if args.eval_config:
        given += _read(args.eval_config)
    names = [each["name"] for each in given]
    for name in names:
        if "/" in name or name.startswith("."):
            raise UserError(
                f"evaluation set {name!r}: a set's name becomes a directory, so it holds no '/' and no leading dot."
            )
        if names.count(name) > 1:
            raise UserError(f"two evaluation sets have the name {name!r}.")
    return [_complete(each, args) for each in given]


def set_args(args: argparse.Namespace, settings: dict[str, Any]) -> argparse.Namespace:
    """`args` as the evaluation of one set sees them: reward, templates, keys and limits are the set's."""
    changes = {
        SETTINGS[name]: settings.get(name)
        for name in SETTINGS
        if not SETTINGS[name].startswith("eval_") and name in settings
    }
    changes["tool_key"] = settings.get("tool_key", args.tool_key)
    if "max_prompt_len" in settings:
        changes["rollout_max_prompt_len"] = settings["max_prompt_len"]
    if "max_context_len" in settings:  # the engines' own limit, if it is known by now, holds as well
        limit = args.rollout_max_context_len or settings["max_context_len"]
        changes["rollout_max_context_len"] = min(limit, settings["max_context_len"])
    own = "rm_type" in settings and settings["rm_type"] != args.rm_type
    if own and settings.get("custom_rm_path") == args.custom_rm_path:
        changes["custom_rm_path"] = None  # the set's own --rm-type, and not the function of the training
    return argparse.Namespace(**{**vars(args), **changes, "reward_key": settings.get("reward_key")})


def _complete(each: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    values = {name: each.get(name, getattr(args, attribute)) for name, attribute in SETTINGS.items()}
    known = {"name": each["name"], "path": str(Path(each["path"]).expanduser().absolute())}
    return known | {name: value for name, value in values.items() if value is not None}


def _read(path: str) -> list[dict[str, Any]]:
    where = f"--eval-config {path}"
    try:
        document = read_custom_config(path)
    except UserError as error:
        raise UserError(str(error).replace("--custom-config-path", "--eval-config")) from None
    section = document.get("eval", document)
    sets = section.get("datasets") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(sets, list) or not sets:
        raise UserError(f"{where}: no list of sets under eval.datasets.")
    defaults = section.get("defaults") or {}
    merged = []
    for number, each in enumerate(sets):
        if not isinstance(each, dict) or not {"name", "path"} <= each.keys():
            raise UserError(f"{where}: set {number} needs a name and a path.")
        for key in {**defaults, **each}:
            if key not in {"name", "path", *SETTINGS}:
                near = difflib.get_close_matches(key, SETTINGS, n=1)
                raise UserError(
                    f"{where}: set {each['name']!r} has an unknown setting {key!r}"
                    + (f": did you mean {near[0]}?" if near else f"; there are {', '.join(SETTINGS)}.")
                )
        merged.append({**defaults, **each})
    return merged
