"""Evaluation: its interval, and the sets of `--eval-prompt-data` and `--eval-config` with their settings.

The file of `--eval-config` (YAML, TOML or JSON) is slime's: `eval.defaults` for all sets, `eval.datasets` a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rltrain.arguments.declare import check_range, declared, flag, without_none, worked_out
from rltrain.arguments.groups.data import Data, absolute
from rltrain.arguments.groups.rollout import Rewards, Rollout
from rltrain.arguments.recipes import read_custom_config
from rltrain.run.errors import UserError, nearest


@dataclass(frozen=True)
class Evaluation:
    """Evaluation."""

    eval_interval: int | None = flag("rollouts between evaluations", metavar="N", at_least=1)
    eval_prompt_data: list[str] | None = flag(
        "one or more pairs of a name and a prompt file; or one file, for a set named eval",
        metavar="NAME FILE",
    )
    eval_config: str | None = flag(
        "file of further sets, each with its own sampling and reward", metavar="FILE"
    )
    skip_eval_before_train: bool = flag("do not evaluate the untrained model", False)
    eval_input_key: str = flag("default: --input-key", metavar="KEY")
    eval_label_key: str | None = flag("default: --label-key", metavar="KEY")
    eval_tool_key: str = flag("default: --tool-key", metavar="KEY")
    eval_reward_key: str | None = flag(
        "entry of a dict reward that counts in evaluation (default: --reward-key)", metavar="KEY"
    )
    n_samples_per_eval_prompt: int = flag("default: 1", 1, metavar="N", at_least=1)
    eval_temperature: float = flag("default: --rollout-temperature", metavar="T", at_least=0)
    eval_top_p: float = flag("default: --rollout-top-p", metavar="P", at_least=1e-6, at_most=1)
    eval_top_k: int = flag("default: --rollout-top-k", metavar="K", at_least=-1)
    eval_max_response_len: int = flag("default: --rollout-max-response-len", metavar="N", at_least=1)
    eval_max_prompt_len: int | None = flag("default: --rollout-max-prompt-len", metavar="N", at_least=1)
    eval_max_context_len: int | None = flag("default: --rollout-max-context-len", metavar="N", at_least=1)
    eval_min_new_tokens: int | None = flag(
        "minimum length of a response, in tokens (default: 0)", metavar="N", at_least=0
    )
    eval_datasets: list[dict[str, Any]] = worked_out([])  # all sets, with every setting that is not None


_ONLY_SET = "eval"  # the name of the set, if --eval-prompt-data gives a file only

# The settings of a set, and the attribute of args that each defaults to.
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
    "environment": "environment",
    "environment_args": "eval_environment_args",
}
_OF_ENVIRONMENT = ("environment", "environment_args")
# Settings of a set that no flag has.
OWN_SETTINGS = ("min_eval_samples", "metadata_overrides")


def resolve_defaults(evaluation: Evaluation, data: Data, rollout: Rollout, rewards: Rewards) -> Evaluation:
    """Fill in what is left out with the values of training."""
    usual: dict[str, Any] = {
        "eval_input_key": data.input_key,
        "eval_label_key": data.label_key,
        "eval_reward_key": rewards.reward_key,
        "eval_tool_key": data.tool_key,
        "eval_temperature": rollout.rollout_temperature,
        "eval_top_p": rollout.rollout_top_p,
        "eval_top_k": rollout.rollout_top_k,
        "eval_max_response_len": rollout.rollout_max_response_len,
    }
    left_out = {name: value for name, value in usual.items() if getattr(evaluation, name) is None}
    return replace(evaluation, **left_out)


def resolve_sets(evaluation: Evaluation, usual: Mapping[str, Any]) -> Evaluation:
    """Read all sets: `name`, `path` (absolute) and every setting that is not None.

    Args:
        evaluation: with its defaults filled in.
        usual: the run's values by name, for the settings that a set leaves out.

    Raises:
        UserError: a set without name or file, two equal names, a name that can't be a directory, an unknown setting.
    """
    words = evaluation.eval_prompt_data or []
    if len(words) == 1:  # slime's older form: a file without a name
        words = [_ONLY_SET, words[0]]
    if len(words) % 2:
        raise UserError(f"--eval-prompt-data takes pairs of a name and a file, but got {len(words)} words.")
    given = [{"name": name, "path": path} for name, path in zip(words[::2], words[1::2], strict=True)]
    if evaluation.eval_config:
        given += _read(evaluation.eval_config)
    names = [each["name"] for each in given]
    for name in names:
        if "/" in name or name.startswith("."):
            raise UserError(
                f"evaluation set {name!r}: a set's name becomes a directory, so it holds no '/' and no leading dot."
            )
        if names.count(name) > 1:
            raise UserError(f"two evaluation sets have the name {name!r}.")
    if evaluation.eval_interval is not None and not given:
        raise UserError("--eval-interval needs --eval-prompt-data NAME FILE, or --eval-config.")
    usual = {**usual, **vars(evaluation)}
    return replace(
        evaluation,
        eval_datasets=[_complete(each, usual) for each in given],
        eval_prompt_data=[word if i % 2 == 0 else absolute(word) for i, word in enumerate(words)] or None,
    )


def only_evaluates(evaluation: Evaluation) -> Evaluation:
    """Of a run without rollouts: the weights that it starts with are evaluated, whatever the other flags say.

    Raises:
        UserError: there are no sets.
    """
    if not evaluation.eval_datasets:
        raise UserError(
            "--num-rollout 0 only evaluates: it needs --eval-prompt-data NAME FILE, or --eval-config."
        )
    return replace(evaluation, eval_interval=evaluation.eval_interval or 1, skip_eval_before_train=False)


def settings_of_set(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The values by name that replace the run's when one set is evaluated: reward, templates, keys and limits."""
    changes = {
        SETTINGS[name]: settings.get(name)
        for name in SETTINGS
        if not SETTINGS[name].startswith("eval_") and name in settings
    }
    changes["tool_key"] = settings.get("tool_key", usual["tool_key"])
    changes["reward_key"] = settings.get("reward_key")
    changes["environment"] = settings.get("environment")
    if "max_prompt_len" in settings:
        changes["rollout_max_prompt_len"] = settings["max_prompt_len"]
    if "max_context_len" in settings:  # the engines' own limit, if it is known by now, holds as well
        limit = usual["rollout_max_context_len"] or settings["max_context_len"]
        changes["rollout_max_context_len"] = min(limit, settings["max_context_len"])
    own = "rm_type" in settings and settings["rm_type"] != usual["rm_type"]
    if own and settings.get("custom_rm_path") == usual["custom_rm_path"]:
        changes["custom_rm_path"] = None  # the set's own --rm-type, and not the function of the training
    return changes


def _complete(each: dict[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: each.get(name, usual[attribute]) for name, attribute in SETTINGS.items()}
    known = {"name": each["name"], "path": absolute(each["path"])}
    values |= {name: each.get(name) for name in OWN_SETTINGS}
    values |= _environment(each, usual)
    return known | {name: value for name, value in values.items() if value is not None}


def _environment(each: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Which environment plays a set, and with what arguments: none, if the set has a generation function of its own.

    Raises:
        UserError: the set names an environment in a run without one, or sets its reward.
    """
    where, given = f"evaluation set {each['name']!r}", [name for name in _OF_ENVIRONMENT if each.get(name)]
    usual_function = usual["custom_generate_function_path"]
    plain = each.get("custom_generate_function_path", usual_function) != usual_function
    if given and plain:
        raise UserError(f"{where} has {' and '.join(given)}, and a generation function of its own.")
    if given and not usual["environment"]:
        raise UserError(
            f"{where} has {' and '.join(given)}, but the run has no --environment: give it, or leave this out."
        )
    if plain or not usual["environment"]:
        return dict.fromkeys(_OF_ENVIRONMENT)
    if own := [name for name in ("rm_type", "custom_rm_path") if each.get(name)]:
        raise UserError(
            f"{where}: its environment has its own reward, so leave {own[0]} out; or give the set a"
            " custom_generate_function_path."
        )
    args = (
        usual["environment_args"]
        if usual["eval_environment_args"] is None
        else usual["eval_environment_args"]
    )
    args = each.get("environment_args", args)
    if not isinstance(args, dict):
        raise UserError(f"{where}: environment_args is {args!r}; it must be a table of names and values.")
    return {"environment": each.get("environment") or usual["environment"], "environment_args": args}


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
    merged, known = [], [*SETTINGS, *OWN_SETTINGS]
    for number, each in enumerate(sets):
        if not isinstance(each, dict) or not {"name", "path"} <= each.keys():
            raise UserError(f"{where}: set {number} needs a name and a path.")
        for key in {**defaults, **each}:
            if key not in {"name", "path", *known}:
                near = nearest(key, known)
                raise UserError(
                    f"{where}: set {each['name']!r} has an unknown setting {key!r}"
                    + (f": did you mean {near}?" if near else f"; there are {', '.join(known)}.")
                )
        merged.append({**defaults, **each})
        _check_own(f"{where}: set {each['name']!r}", merged[-1])
        _check_numbers(f"{where}: set {each['name']!r}", merged[-1])
    return merged


def _check_numbers(where: str, settings: Mapping[str, Any]) -> None:
    """A setting has the type and the limits of the flag that it stands for."""
    flags = {each.name: each for each in declared(Evaluation)}
    for name, attribute in SETTINGS.items():
        of, value = flags.get(attribute), settings.get(name)
        if of is None or value is None or (kind := without_none(of.hint)) not in (int, float):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise UserError(
                f"{where}: {name} is {value!r}; it must be a number{' without a fraction' * (kind is int)}."
            )
        check_range(f"{where}: {name}", value, of.flag)


def _check_own(where: str, settings: Mapping[str, Any]) -> None:
    least = settings.get("min_eval_samples")
    if least is not None and (not isinstance(least, int) or least < 1):
        raise UserError(
            f"{where}: min_eval_samples is {least!r}; it must be a number of samples, at least 1."
        )
    overrides = settings.get("metadata_overrides")
    if overrides is not None and not isinstance(overrides, dict):
        raise UserError(
            f"{where}: metadata_overrides is {overrides!r}; it must be a table of names and values."
        )
