"""A model's Hugging Face directory: where it is, its `config.json`, and what is said where it can't be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rltrain.run.errors import UserError
from rltrain.run.files import read_json, read_object

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


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
    config = read_object(path)
    has_weights = (directory / "model.safetensors").exists() or any(directory.glob("model*.safetensors*"))
    if not without_weights and not has_weights:
        raise UserError(
            f"--hf-checkpoint {directory}: no model*.safetensors in it.{other_weights(directory)} Give the weights,"
            " or --random-init to start from random ones."
        )
    return config


def tensor_files(directory: Path) -> dict[str, str]:
    """The name of the file that holds each of a directory's tensors.

    Raises:
        UserError: it has no safetensors, or none of one model alone.
    """
    index, one_file = directory / INDEX, directory / ONE_FILE
    if not index.exists():
        if not one_file.exists():
            raise UserError(f"{directory} has neither {ONE_FILE} nor {INDEX}: weights are read from safetensors only."
                            f"{other_weights(directory)} Give --random-init to start from random weights.")  # fmt: skip
        return dict.fromkeys(read_header(one_file)[1], ONE_FILE)
    found = read_json(index)
    files = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(files, dict):
        raise UserError(
            f"{index}: not an index of safetensors files: expected a JSON object with a weight_map."
        )
    if one_file.exists() and set(files.values()) != {ONE_FILE}:
        raise UserError(
            f"{directory} has both {ONE_FILE} and {INDEX}, which names other files: transformers would read one and"
            " SGLang the other. Remove the one that is out of date."
        )
    missing = sorted(file for file in set(files.values()) if not (directory / file).is_file())
    if missing:
        raise UserError(f"{directory} lacks {', '.join(missing[:3])}, which its {INDEX} names.")
    return files


def read_header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the data of a safetensors file begin, and what its header says of every tensor.

    The file begins with the length of a JSON text and that text:
    https://huggingface.co/docs/safetensors/index#format

    Raises:
        OSError: it can't be read.
        UserError: it is another kind of file.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            begin = 8 + int.from_bytes(opened.read(8), "little")
            if begin > size:
                raise ValueError(f"a header of {begin} bytes in a file of {size}")
            described = json.loads(opened.read(begin - 8))
        described.pop("__metadata__", None)
        end = max((each["data_offsets"][1] for each in described.values()), default=0)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UserError(f"{file}: not a safetensors file ({error}).") from None
    if begin + end != size:
        raise UserError(
            f"{file}: not a whole safetensors file ({size} bytes, where its header has {begin + end})."
        )
    return begin, described


def _download(directory: Path) -> str:
    """How to get a model whose id on the Hugging Face Hub was given in place of a directory, if it looks like one."""
    if (
        directory.parent.exists() or directory.parent.parent != Path.cwd()
    ):  # given as OWNER/MODEL, no other path
        return ""
    owner, model = directory.parts[-2:]
    return (
        f" If {owner}/{model} is a model of the Hugging Face Hub, download it first: `hf download {owner}/{model}`"
        f" downloads it into the local cache, where this name finds it; or, with `--local-dir models/{model}`, give"
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
