"""The tensors of a Hugging Face directory, read slice by slice from its safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rltrain.models.directory import tensor_files
from rltrain.run.errors import UserError

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
        self._files = tensor_files(directory)
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
