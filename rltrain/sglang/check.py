"""Whether an engine serves the model that the trainer trains: checked when it is met for the first time."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

from rltrain.arguments.errors import UserError
from rltrain.arguments.hf_config import ModelShape, read_model_shape

# Other values of these change nothing that the weights depend on.
_UNIMPORTANT = {"max_positions", "init_std"}


class EngineInfo(Protocol):
    """What is needed of `rltrain.sglang.adapter.HttpServerEngineAdapter`."""

    url: str

    def get_model_info(self) -> dict[str, Any]:
        """The model that it serves."""

    def get_server_info(self) -> dict[str, Any]:
        """The arguments that it runs with."""


def check_engine(args: argparse.Namespace, engine: EngineInfo) -> list[str]:
    """See that the engine can take the trainer's weights.

    Returns:
        What is different and does no harm, in words.

    Raises:
        UserError: the model has another shape or vocabulary; says what differs.
    """
    info = engine.get_model_info()
    ours, path = _config(Path(args.hf_checkpoint)), Path(info["model_path"])
    if ours is None:
        return []
    notes = []
    if info.get("architectures") not in (None, ours.get("architectures")):
        raise UserError(
            f"the engine {engine.url} serves {path}, a {info['architectures']}, but the trainer trains"
            f" {args.hf_checkpoint}, a {ours.get('architectures')}. Start it with that model."
        )
    theirs = _config(path)
    if theirs is None:
        notes.append(
            f"the engine {engine.url} serves {path}, which can't be read from here: its shape is not checked"
        )
    elif differences := shape_differences(read_model_shape(ours), read_model_shape(theirs)):
        raise UserError(
            f"the engine {engine.url} serves {path}, which differs from the trainer's {args.hf_checkpoint}:"
            f" {'; '.join(differences)}. Weights of the one do not fit the other: start the engine with that model."
        )
    return notes + dtype_notes(args, engine)


def shape_differences(ours: ModelShape, theirs: ModelShape) -> list[str]:
    """What is different, with both values; a padded vocabulary is explained."""
    differences = []
    for field in dataclasses.fields(ModelShape):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if mine != other and field.name not in _UNIMPORTANT:
            padded = " (it is padded differently)" if field.name == "vocab_size" else ""
            differences.append(f"{field.name} is {other} there and {mine} here{padded}")
    return differences


def dtype_notes(args: argparse.Namespace, engine: EngineInfo) -> list[str]:
    """That weights are converted on their way, if the engine computes with another type than the trainer."""
    trainer = "bfloat16" if args.bf16 else "float32"
    server = engine.get_server_info().get("dtype")
    if server in (None, "auto", trainer):
        return []
    return [
        f"the engine {engine.url} computes in {server}, the trainer in {trainer}: weights are converted on loading"
    ]


def _config(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return None
