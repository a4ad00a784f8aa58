"""The tensors of a Hugging Face directory, read slice by slice from its safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rltrain.models.directory import other_weights
from rltrain.run.errors import UserError

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsDirectory:
    """The tensors of a Hugging Face directory; reads only the slices that are asked for.

    Attributes:
        names: Of all its tensors.
    """

    def __init__(self, directory: Path) -> None:
        """Look which file holds which tensor.

        Raises:
            UserError: it has no safetensors, or none of one model alone.
        """
        self.directory = directory
        self._files = _tensor_files(directory)
        self.names = self._files.keys()
        self._open: dict[str, Any] = {}

    def tensor(self, name: str, shape: tuple[int, ...] | None, *, of_any_type: bool = False) -> Any:
        """safetensors' lazy slice of a tensor: `get_shape()`, and reading by indexing.

        Args:
            shape: That it must have; None: any.
            of_any_type: It may be quantised.

        Raises:
            UserError: the directory has no such tensor, its file can't be read, or it is another one.
        """
        file = self._files.get(name)
        if file is None:
            raise UserError(f"{self.directory} has no tensor {name}: its weights do not fit its config.json.")
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.directory / file, framework="pt")
            found = self._open[file].get_slice(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{name} can't be read from {self.directory / file}: {error}.") from None
        if shape is not None and tuple(found.get_shape()) != shape:
            raise UserError(
                f"{name} in {self.directory / file} has shape {tuple(found.get_shape())}, but config.json asks for"
                f" {shape}."
            )
        if not of_any_type and found.get_dtype() not in _FLOATS:
            raise UserError(
                f"{name} in {self.directory / file} is quantised ({found.get_dtype()}), which can't be trained. Give"
                " the model's bf16 weights."
            )
        return found


def _tensor_files(directory: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    index, one_file = directory / _INDEX, directory / _ONE_FILE
    if not index.exists():
        if not one_file.exists():
            raise UserError(f"{directory} has neither {_ONE_FILE} nor {_INDEX}: weights are read from safetensors only."
                            f"{other_weights(directory)} Give --random-init to start from random weights.")  # fmt: skip
        return dict.fromkeys(_names(one_file), _ONE_FILE)
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not an index of safetensors files ({error!r}).") from None
    if one_file.exists() and set(files.values()) != {_ONE_FILE}:
        raise UserError(
            f"{directory} has both {_ONE_FILE} and {_INDEX}, which names other files: transformers would read the"
            " one and SGLang the other. Remove the one that is out of date."
        )
    missing = sorted(file for file in set(files.values()) if not (directory / file).is_file())
    if missing:
        raise UserError(f"{directory} lacks {', '.join(missing[:3])}, which its {_INDEX} names.")
    return files


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file ({error}).") from None
