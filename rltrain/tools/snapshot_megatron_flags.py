"""Write into `megatron_flags.txt` the flags of the megatron-core that is installed; the lines of other releases stay.

A login node has no megatron-core, or no driver that importing all of it needs, yet a launch script's flags should be
checked there. Run `python -m rltrain.tools.snapshot_megatron_flags` with each new release that fits; a test compares
the file with the installed package. A wheel from 0.17 on has Megatron's own parser, which is asked. For 0.16 the names
follow the rules of its `ArgumentGroupFactory`: a field's name with dashes, `--no-…` and `--disable-…` where a switch is
on by default, and a field's own `argparse_meta` first.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from rltrain.arguments.megatron_names import (
    SNAPSHOT,
    MegatronFlag,
    as_flag,
    installed_version,
    read_parser,
    release_of,
    snapshot,
    snapshot_versions,
)


def describe(name: str, config: type) -> list[MegatronFlag]:
    """The flags of a configuration class.

    Kinds: on, off (a switch), int, float, str, choice, and ints, floats, strs (several values).
    Fields of other types (functions, unions) have no flag.
    """
    hints = typing.get_type_hints(config)
    flags = []
    for field in dataclasses.fields(config):
        kind = "off" if hints[field.name] is bool and field.default is True else _kind(hints[field.name])
        if kind is None or not field.init:
            continue
        dashed = field.name.replace("_", "-")
        names = [f"--no-{dashed}", f"--disable-{dashed}"] if kind == "off" else [f"--{dashed}"]
        names = field.metadata.get("argparse_meta", {}).get("arg_names", names)
        kind, *choices = kind.split()
        flags += [
            MegatronFlag(flag.removeprefix("--"), field.name, name, kind, tuple(choices)) for flag in names
        ]
    return flags


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


def installed_flags() -> list[MegatronFlag]:
    """The flags of the megatron-core that is installed here; imports torch (seconds)."""
    from rltrain.megatron import device

    device.set_up()
    parser = read_parser()[1] if find_spec("megatron.training") else None
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    classes = {
        "transformer": TransformerConfig,
        "optimizer": OptimizerConfig,
        "ddp": DistributedDataParallelConfig,
    }
    if parser is None:
        return [flag for name, config in classes.items() for flag in describe(name, config)]
    fields = {
        field.name: name for name, each in reversed(classes.items()) for field in dataclasses.fields(each)
    }
    return [as_flag(name, action, fields.get(action.dest, "-")) for name, action in parser.items()]


def to_lines(flags: Iterable[MegatronFlag]) -> list[str]:
    """One line a flag; a flag that is the same in several releases has one line, with all of them."""
    versions: dict[MegatronFlag, set[str]] = {}
    for flag in flags:
        versions.setdefault(replace(flag, versions=()), set()).update(flag.versions)
    return sorted(
        " ".join([flag.name, flag.field, flag.config, flag.kind, ",".join(sorted(releases)), *flag.choices])
        for flag, releases in versions.items()
    )


def updated(stored: Iterable[MegatronFlag], flags: Iterable[MegatronFlag], version: str) -> list[str]:
    """The lines of the file, with `flags` in place of what it has of that release."""
    release = release_of(version)
    others = [replace(flag, versions=tuple(v for v in flag.versions if v != release)) for flag in stored]
    return to_lines(
        [*(each for each in others if each.versions), *(replace(each, versions=(release,)) for each in flags)]
    )


def main() -> None:
    """Write the file."""
    version = installed_version()
    assert version, "megatron-core is not installed"
    others = [each for each in snapshot_versions() if release_of(each) != release_of(version)]
    lines = updated(snapshot(), installed_flags(), version)
    SNAPSHOT.write_text("\n".join([f"# megatron-core {' '.join(sorted([*others, version]))}", *lines]) + "\n")


if __name__ == "__main__":
    main()
