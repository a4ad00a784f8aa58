"""A model's Hugging Face directory: where it is, its `config.json`, and what is said where it can't be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rltrain.run.errors import UserError


def cached_model(name: str) -> str:
    """The directory in the local Hugging Face cache of a model that is named by its id; any other name as it is."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
        return name
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:  # then nothing here has filled the cache
        return name
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the Hub could have
        return name
    return str(Path(found).parent) if isinstance(found, str) else name


def read_hf_config(directory: Path, without_weights: bool = False) -> dict[str, Any]:
    """`config.json` of `--hf-checkpoint`, having checked that the directory can be used.

    Raises:
        UserError: no such directory, no `config.json`, not JSON, or no weights although they are needed.
    """
    path = directory / "config.json"
    if directory.is_file():
        raise UserError(
            f"--hf-checkpoint {directory}: it is a file; give the directory that has config.json."
        )
    if not directory.is_dir():
        raise UserError(f"--hf-checkpoint {directory}: there is no such directory.{_download(directory)}")
    if not path.is_file():
        raise UserError(
            f"--hf-checkpoint {directory}: no config.json in it, so it is not a Hugging Face model."
            f"{other_weights(directory)}"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the configuration of a model, but a {type(config).__name__}.")
    has_weights = (directory / "model.safetensors").exists() or any(directory.glob("model*.safetensors*"))
    if not without_weights and not has_weights:
        raise UserError(
            f"--hf-checkpoint {directory}: no model*.safetensors in it.{other_weights(directory)} Give the weights,"
            " or --random-init to start from random ones."
        )
    return config


def tensor_names(directory: Path) -> set[str]:
    """The names of a directory's tensors, from its index or from the head of its only file.

    Raises:
        OSError, ValueError, KeyError: they can't be read.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    with (directory / "model.safetensors").open("rb") as file:
        return set(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


def _download(directory: Path) -> str:
    """How to get a model whose id on the Hugging Face Hub was given in place of a directory, if it looks like one."""
    if directory.parent.exists() or not directory.parent.parent.is_dir():
        return ""
    owner, model = directory.parts[-2:]
    return (
        f" If {owner}/{model} is a model of the Hugging Face Hub, download it first: `hf download {owner}/{model}`"
        f" puts it into the local cache, where it is found by this name; or, with `--local-dir models/{model}`, give"
        f" --hf-checkpoint models/{model}."
    )


def other_weights(directory: Path) -> str:
    """What to do with weights of another kind in a directory, as the next sentence of a message; else empty."""
    if (directory / "adapter_config.json").exists():
        return (
            " It holds an adapter: merge it into its base model with PEFT's `merge_and_unload()` and give what"
            " `save_pretrained` writes of that."
        )
    if any(directory.glob("*.gguf")):
        return " Its weights are GGUF, which is quantised and can't be trained: give the model's bf16 safetensors."
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        return " Its weights are pickled (.bin): load and save them once with transformers, which writes safetensors."
    return ""
