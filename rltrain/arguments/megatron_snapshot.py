"""Write `megatron_flags.txt`: the flags that Megatron makes of megatron-core's configuration dataclasses.

A login node has no megatron-core, yet a launch script's flags should be checked there. Run
`python -m rltrain.arguments.megatron_snapshot` after changing the pin; a test compares the file with the
installed package. Names and types follow the rules of Megatron-LM's `ArgumentGroupFactory`: a field's name
with dashes, `--no-…` and `--disable-…` where a switch is on by default, and a field's own `argparse_meta` first.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).with_name("megatron_flags.txt")


def describe(name: str, config: type) -> list[str]:
    """One line a flag: flag, field, class, kind and, for a kind `choice`, the choices.

    Kinds: on, off (a switch), int, float, str, choice, and ints, floats, strs (several values).
    Fields of other types (functions, unions) have no flag.
    """
    hints = typing.get_type_hints(config)
    lines = []
    for field in dataclasses.fields(config):
        kind = "off" if hints[field.name] is bool and field.default is True else _kind(hints[field.name])
        if kind is None or not field.init:
            continue
        dashed = field.name.replace("_", "-")
        names = [f"--no-{dashed}", f"--disable-{dashed}"] if kind == "off" else [f"--{dashed}"]
        names = field.metadata.get("argparse_meta", {}).get("arg_names", names)
        lines += [f"{flag.removeprefix('--')} {field.name} {name} {kind}" for flag in names]
    return lines


def _kind(hint: Any) -> str | None:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [each for each in typing.get_args(hint) if each is not type(None)]
        return _kind(inner[0]) if len(inner) == 1 else None
    if typing.get_origin(hint) is list:
        kind = _kind(typing.get_args(hint)[0])
        return f"{kind}s" if kind in ("int", "float", "str") else None
    if typing.get_origin(hint) is typing.Literal:
        return "choice " + " ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "choice " + " ".join(each.name for each in hint)
    return {bool: "on", int: "int", float: "float", str: "str"}.get(hint)


def installed_flags() -> list[str]:
    """The lines for the megatron-core that is installed here; imports torch (seconds)."""
    from rltrain.megatron import device

    device.set_up()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    lines = describe("transformer", TransformerConfig)
    lines += describe("optimizer", OptimizerConfig)
    lines += describe("ddp", DistributedDataParallelConfig)
    return [f"# megatron-core {version('megatron-core')}", *sorted(lines)]


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(installed_flags()) + "\n")
