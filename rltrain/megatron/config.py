"""Megatron-core's configuration objects, with the fields that flags hand on to them."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import typing
from typing import Any, TypeVar

import torch

from rltrain.arguments.errors import UserError
from rltrain.arguments.megatron_config import given

T = TypeVar("T")

_NAMES = {
    "TransformerConfig": "transformer",
    "OptimizerConfig": "optimizer",
    "DistributedDataParallelConfig": "ddp",
}
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.uint8,  # as TransformerEngine stores it
}


def build_config(config: type[T], args: argparse.Namespace, **fields: Any) -> T:
    """An object of `config`, one of Megatron-core's dataclasses; fields that flags have set come before `fields`.

    Raises:
        UserError: the installed megatron-core has no such field, or refuses the values.
    """
    flags = given(args, _NAMES[config.__name__])
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
