"""Writes a Hugging Face model directory from a stream of tensors, so that it is there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rltrain.weights.buckets import Piece

_SHARD_BYTES = 2 * 1024**3  # held in memory at a time
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def write_hf_directory(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], template: Path, shard_bytes: int | None = None
) -> None:
    """Write weights as safetensors, with the configuration and tokenizer of another directory.

    Args:
        directory: Must not exist; appears under its name when it is complete.
        tensors: Hugging Face names and tensors on any device, all of one type; consumed one by one.
        template: The model directory that everything but the weights is copied from.
        shard_bytes: About the size of a file, which is held in memory (default: 2 GiB).

    Raises:
        OSError: it can't be written; what was there under its name is untouched.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        dtype = _write_weights(temporary, tensors, shard_bytes or _SHARD_BYTES)
        _copy_rest(temporary, template, dtype)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
        raise OSError(f"{directory} can't be written ({error}): is the disk full, or read-only?") from error
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


def pieces_of(shard: Path) -> tuple[Piece, ...]:
    """Where the tensors of a safetensors file lie in it: it begins with the length of a JSON text, and that text."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        described = json.loads(file.read(length))
    described.pop("__metadata__", None)
    return tuple(
        Piece(
            name,
            _DTYPES[each["dtype"]],
            tuple(each["shape"]),
            *(8 + length + at for at in each["data_offsets"]),
        )
        for name, each in described.items()
    )


def _write_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> torch.dtype:
    shard: dict[str, Tensor] = {}
    held = total = 0
    file_of: dict[str, str] = {}
    dtype = torch.float32

    def flush() -> None:
        name = f"model-{len(set(file_of.values())) + 1:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > shard_bytes:
            flush()
            held = 0
        # safetensors refuses tensors that share memory, as slices of a parameter do.
        shard[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        held, total, dtype = held + size, total + size, tensor.dtype
    flush()
    if len(set(file_of.values())) == 1:
        (directory / "model-00001.safetensors").rename(directory / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return dtype


def _copy_rest(directory: Path, template: Path, dtype: torch.dtype) -> None:
    for path in template.iterdir():
        is_index = path.name.endswith(".index.json")
        if (
            path.is_file()
            and path.suffix not in _WEIGHT_SUFFIXES
            and not is_index
            and path.name != "config.json"
        ):
            shutil.copyfile(path, directory / path.name)
    config = json.loads((template / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2))
