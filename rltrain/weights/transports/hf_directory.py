"""Writes a Hugging Face model directory, from one process or many; it appears when it is complete."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltrain.models.directory import read_header
from rltrain.run.files import put_in_place, read_object
from rltrain.weights.buckets import NamedTensor, Piece

_SHARD_BYTES = 2 * 1024**3
_HEADER_BYTES = 128 * 1024
_DESCRIPTION_BYTES = 160  # of a tensor, at most, beside its name
_FP8 = "float8_e4m3fn"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": _FP8}
_CODES = {name: code for code, name in _DTYPES.items()}
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


@dataclass(frozen=True)
class Written:
    """Weights that one process has written.

    Attributes:
        file_of: name of the file that each tensor is in.
        dtype: of most of them that are not quantised, as in `torch.<dtype>`; None if there are none.
    """

    file_of: dict[str, str]
    nbytes: int
    dtype: str | None


def write_hf_directory(
    directory: Path, tensors: Iterable[NamedTensor], template: Path, shard_bytes: int | None = None
) -> None:
    """Write weights as safetensors, with the configuration and tokenizer of another directory.

    Args:
        directory: Appears under its name when it is complete.
        tensors: Hugging Face names and tensors on any device; consumed one by one.
        template: The model directory that everything but the weights is copied from.
        shard_bytes: Of a file, about (default: 2 GiB).

    Raises:
        OSError: it can't be written; a directory that had this name before is untouched.
    """
    temporary = begin(directory)
    try:
        finish(directory, [write_weights(temporary, tensors, shard_bytes)], template)
    except OSError as error:
        raise give_up(directory, f"{error}") from error


def begin(directory: Path) -> Path:
    """An empty directory, to write weights into, that `finish` will give its name."""
    temporary = temporary_of(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def temporary_of(directory: Path) -> Path:
    """Where a directory is until it is complete."""
    return directory.with_name(f".{directory.name}.tmp")


def write_weights(
    temporary: Path, tensors: Iterable[NamedTensor], shard_bytes: int | None = None, writer: int = 0
) -> Written:
    """Write files of about `shard_bytes`, with the number of the writer in their names.

    Raises:
        OSError: they can't be written.
    """
    file_of: dict[str, str] = {}
    files = 0
    nbytes: Counter[str] = Counter()
    shard: _Shard | None = None
    try:
        for name, tensor in tensors:
            if shard is not None and not shard.has_room(name, tensor, shard_bytes or _SHARD_BYTES):
                shard.finish()
                shard, files = None, files + 1
            shard = shard or _Shard(temporary / _file_name(writer, files))
            shard.add(name, tensor)
            file_of[name] = shard.path.name
            nbytes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        if shard is not None:
            shard.finish()
    finally:
        if shard is not None:
            shard.file.close()
    dtype = max((each for each in nbytes if each != _FP8), key=nbytes.__getitem__, default=None)
    return Written(file_of, nbytes.total(), dtype)


def finish(directory: Path, written: Sequence[Written], template: Path) -> None:
    """Add all but the weights, and have the directory appear under its name.

    Raises:
        OSError: that can't be written.
    """
    temporary = temporary_of(directory)
    file_of = {name: file for each in written for name, file in each.file_of.items()}
    files = sorted(set(file_of.values()))
    if len(files) == 1:
        (temporary / files[0]).rename(temporary / "model.safetensors")
    else:
        index = {"metadata": {"total_size": sum(each.nbytes for each in written)}, "weight_map": file_of}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    # A router's biases are in fp32 in every model.
    most = max((each for each in written if each.dtype), key=lambda each: each.nbytes)
    assert most.dtype is not None
    _copy_rest(temporary, template, most.dtype)
    put_in_place(temporary, directory)


def give_up(directory: Path, why: str) -> OSError:
    """Leave nothing behind, because a full disk needs the room; returns the error to raise."""
    shutil.rmtree(temporary_of(directory), ignore_errors=True)
    return OSError(f"{directory} can't be written ({why}): is the disk full, or read-only?")


def pieces_of(shard: Path) -> tuple[Piece, ...]:
    """Where the tensors of a safetensors file lie in it."""
    begin, described = read_header(shard)
    return tuple(
        Piece(
            name,
            _DTYPES[each["dtype"]],
            tuple(each["shape"]),
            *(begin + at for at in each["data_offsets"]),
        )
        for name, each in described.items()
    )


def _file_name(writer: int, number: int) -> str:
    return f"model-{writer:05d}-{number:05d}.safetensors"


class _Shard:
    """A safetensors file that is written tensor by tensor; the library itself first makes a copy of everything.

    The file begins with the length of a JSON text and that text, padded with spaces:
    https://huggingface.co/docs/safetensors/index#format
    """

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("wb")
        self.file.seek(_HEADER_BYTES)
        self._described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._text_bytes = 0
        self._end = 0

    def has_room(self, name: str, tensor: Tensor, nbytes: int) -> bool:
        """Whether it stays below this size with another tensor."""
        is_described = self._text_bytes + len(name) + _DESCRIPTION_BYTES <= _HEADER_BYTES
        return is_described and self._end + tensor.nbytes <= nbytes

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, from whichever device."""
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        end = self._end + flat.nbytes
        dtype = _CODES[str(tensor.dtype).removeprefix("torch.")]
        self._described[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [self._end, end],
        }
        self.file.write(flat.view(torch.uint8).numpy().data)
        self._text_bytes += len(name) + _DESCRIPTION_BYTES
        self._end = end

    def finish(self) -> None:
        """Write what is in it, at its beginning."""
        length, text = _HEADER_BYTES - 8, json.dumps(self._described).encode()
        assert len(text) <= length, "it would write over the first tensor"
        self.file.seek(0)
        self.file.write(length.to_bytes(8, "little") + text.ljust(length))
        self.file.close()


def _copy_rest(directory: Path, template: Path, dtype: str) -> None:
    for path in template.iterdir():
        is_index = path.name.endswith(".index.json")
        if (
            path.is_file()
            and path.suffix not in _WEIGHT_SUFFIXES
            and not is_index
            and path.name != "config.json"
        ):
            shutil.copyfile(path, directory / path.name)
    config = read_object(template / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2))
