"""Look at the files that the flags name, before anything is started: prompts, model, custom functions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rltrain.arguments.errors import UserError


def check_inputs(args: argparse.Namespace) -> None:
    """Check every input file of a run; sets `num_rollout` where `--num-epoch` was given.

    Raises:
        UserError: one paragraph with the file, the line where there is one, and what to do.
    """
    from rltrain.arguments.hf_config import check_hf_config
    from rltrain.data.prompts import check_prompt_file
    from rltrain.functions import check_function

    check_hf_config(read_hf_config(args), args)
    if args.apply_chat_template:
        _check_chat_template(Path(args.hf_checkpoint))
    prompts = check_prompt_file(args.prompt_data, args.input_key, args.label_key, args.metadata_key)
    for path in (args.eval_prompt_data or [])[1::2]:
        check_prompt_file(path, args.eval_input_key, args.eval_label_key, args.metadata_key)
    if args.num_rollout is None:
        args.num_rollout = max(1, args.num_epoch * prompts // args.rollout_batch_size)
    for flag in (
        "rollout_function_path",
        "eval_function_path",
        "custom_generate_function_path",
        "custom_rm_path",
    ):
        if getattr(args, flag):
            check_function(getattr(args, flag), flag="--" + flag.replace("_", "-"))


def read_hf_config(args: argparse.Namespace) -> dict[str, Any]:
    """`config.json` of `--hf-checkpoint`, having checked that the directory can be used.

    Raises:
        UserError: no such directory, no `config.json`, not JSON, or no weights and no `--random-init`.
    """
    directory = Path(args.hf_checkpoint)
    path = directory / "config.json"
    if not directory.is_dir():
        raise UserError(f"--hf-checkpoint {directory}: there is no such directory.")
    if not path.is_file():
        raise UserError(f"--hf-checkpoint {directory}: no config.json in it, so it is no Hugging Face model.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    has_weights = any(directory.glob("*.safetensors"))
    if not has_weights and not args.random_init:
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
