"""Megatron-core's dataclasses, filled with our values and with those of the flags that are named like their fields."""

from __future__ import annotations

import dataclasses
import enum
import typing
from typing import Any, TypeVar

import torch

from rltrain.arguments.groups.model import Model
from rltrain.arguments.megatron_names import given
from rltrain.run.errors import UserError

T = TypeVar("T")

_FLAG_GROUPS = {
    "TransformerConfig": "transformer",
    "MLATransformerConfig": "transformer",
    "OptimizerConfig": "optimizer",
    "DistributedDataParallelConfig": "ddp",
}
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.uint8,  # as TransformerEngine stores it
}


def build_config(config: type[T], model: Model, **fields: Any) -> T:
    """An object of `config`, one of Megatron-core's dataclasses; fields that flags have set come before `fields`.

    Raises:
        UserError: the installed megatron-core has no such field, or refuses the values.
    """
    flags = given(model, _FLAG_GROUPS[config.__name__])
    if not flags:
        return config(**fields)
    known = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    if missing := sorted(flags.keys() - known):
        raise UserError(
            f"--{missing[0].replace('_', '-')}: the installed megatron-core has no {config.__name__}.{missing[0]};"
            " leave the flag out, or install a version that has it."
        )
    hints = typing.get_type_hints(config)
    converted = {name: _converted(value, hints[name]) for name, value in flags.items()}
    try:
        return config(**{**fields, **converted})
    except (AssertionError, ValueError) as error:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in flags)
        raise UserError(f"megatron-core refuses {names}: {error}") from error


def _converted(value: Any, hint: Any) -> Any:
    if hint is torch.dtype:
        return _DTYPES[value]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint[value]
    return value
