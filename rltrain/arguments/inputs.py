"""Look at the files that the flags name, before anything is started: prompts, model, custom functions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rltrain.arguments.debug_flags import check_recorded
from rltrain.arguments.errors import UserError
from rltrain.arguments.eval_sets import set_args
from rltrain.arguments.extensions import check_extensions
from rltrain.arguments.external import external_token, uses_external_engines
from rltrain.arguments.slime_defaults import DEFAULT_DATA_SOURCE, DEFAULT_ROLLOUT_FUNCTION


def check_inputs(args: argparse.Namespace, to_come: Mapping[str, str] | None = None) -> None:
    """Check every input file of a run; sets `num_rollout` where `--num-epoch` was given.

    Args:
        args: resolved flags.
        to_come: model directories that a job before this one writes, each with one that is alike but for the weights.

    Raises:
        UserError: one paragraph with the file, the line where there is one, and what to do.
    """
    from rltrain.arguments.hf_config import check_hf_config
    from rltrain.arguments.model_flags import check_model_flags
    from rltrain.data.epochs import Epochs, prompt_files
    from rltrain.data.prompt_file import check_prompt_file
    from rltrain.rewards.rules import reward_function_path

    if uses_external_engines(args) or args.sglang_router_ip:
        external_token()
    for served in args.sglang_models:
        if (
            served["model_path"] != args.hf_checkpoint
            and not (Path(served["model_path"]) / "config.json").is_file()
        ):
            raise UserError(
                f"--sglang-config: model {served['name']}: {served['model_path']} is no model directory."
            )
    model = Path((to_come or {}).get(args.hf_checkpoint, args.hf_checkpoint))
    without_weights = args.random_init or args.hf_checkpoint in (to_come or {})
    config = read_hf_config(model, without_weights)
    check_hf_config(config, args)
    check_model_flags(args, config)
    if args.apply_chat_template:
        _check_chat_template(model)
    if args.load_debug_rollout_data:
        check_recorded(args)
        check_extensions(args)
        return
    files = prompt_files(args)
    sizes = [check_prompt_file(path, args.input_key, args.label_key, args.metadata_key) for path, _ in files]
    prompts = len(Epochs(tuple(sizes), tuple(weight for _, weight in files)))
    if prompts < args.rollout_batch_size and args.data_source_path == DEFAULT_DATA_SOURCE:
        raise UserError(
            f"{' and '.join(path for path, _ in files)}: an epoch has {prompts} prompts, fewer than"
            f" --rollout-batch-size {args.rollout_batch_size}: one batch would hold the same prompt twice."
        )
    for each in args.eval_datasets:
        check_prompt_file(each["path"], each["input_key"], each.get("label_key"), each["metadata_key"])
    if args.num_rollout is None:
        args.num_rollout = max(1, args.num_epoch * prompts // args.rollout_batch_size)
    if args.loss_type != "sft_loss" and args.rollout_function_path == DEFAULT_ROLLOUT_FUNCTION:
        reward_function_path(args)
        for each in args.eval_datasets:
            reward_function_path(set_args(args, each))
    for namespace in (args, *(set_args(args, each) for each in args.eval_datasets)):
        check_extensions(namespace)


def read_hf_config(directory: Path, without_weights: bool = False) -> dict[str, Any]:
    """`config.json` of `--hf-checkpoint`, having checked that the directory can be used.

    Raises:
        UserError: no such directory, no `config.json`, not JSON, or no weights, unless it can do without.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        raise UserError(f"--hf-checkpoint {directory}: there is no such directory.")
    if not path.is_file():
        raise UserError(f"--hf-checkpoint {directory}: no config.json in it, so it is no Hugging Face model.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    if not without_weights and not any(directory.glob("*.safetensors")):
        raise UserError(
            f"--hf-checkpoint {directory}: no *.safetensors in it. Give the weights, or --random-init to start"
            " from random ones."
        )
    return config


def _check_chat_template(directory: Path) -> None:
    config = directory / "tokenizer_config.json"
    if any(directory.glob("chat_template.*")) or (directory / "additional_chat_templates").is_dir():
        return
    if config.is_file() and json.loads(config.read_text()).get("chat_template"):
        return
    raise UserError(
        f"--apply-chat-template: the tokenizer in {directory} has no chat template. Give a model whose"
        " tokenizer has one, or write prompts as plain text and leave the flag out."
    )
