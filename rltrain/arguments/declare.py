"""Declare a flag once, as a field of a frozen dataclass, and derive the command line from it.

    @dataclass(frozen=True)
    class Checkpoint:
        \"""model and checkpoints\"""

        save_interval: int | None = flag("rollouts between two checkpoints", metavar="N", at_least=1)

The field's name is the flag's name and the name of the attribute in slime's `args`. Its annotation says what the
command line takes: `bool` is a switch, `bool | None` a switch with a `--no-` form, `list[T]` several values, a
`Literal` one of these, `dict` JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from rltrain.run.errors import UserError

Owner = Literal["slime", "Megatron", "slurmlime"]
_KEY = "flag"


@dataclass(frozen=True)
class Call:
    """How a function that a flag names is called. The names are those of slime's signatures.

    Attributes:
        keywords: given by name.
        optional: given by name to functions that have such a parameter.
        coroutine: whether it is an `async def`, which is awaited; None: either.
        or_positional: another way in which it may be called.
    """

    positional: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    coroutine: bool | None = False
    or_positional: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Flag:
    """The rest of a declaration: everything but the field's name, annotation and default.

    Attributes:
        help: one line for `--help`; None hides the flag there.
        owner: the project that defines the name and the meaning; None: the group's `owner`, else slime.
        option: the spelling, if it is not the field's name, such as `--disable-…` for a switch that turns off.
        older: another spelling that is accepted.
        append: the flag may be given more than once.
        empty: a list may be given without a value.
        at_least: the smallest number that is accepted.
        at_most: the largest one.
        call: for a flag that names a function.
    """

    help: str | None
    owner: Owner | None = None
    option: str | None = None
    older: str | None = None
    metavar: str | None = None
    append: bool = False
    empty: bool = False
    at_least: float | None = None
    at_most: float | None = None
    call: Call | None = None


def flag(help: str | None, default: Any = None, **more: Any) -> Any:
    """A field that is a flag; see `Flag` for `more`.

    A field whose annotation leaves None out and whose default is None is one that `resolve` fills in or asks for.
    """
    return _field(default, {_KEY: Flag(help, **more)})


def function(help: str, default: Any = None, **more: Any) -> Any:
    """A flag that names a function by its import path; `Call`'s attributes say how that is called."""
    call = {name: more.pop(name) for name in [*more] if name in Call.__dataclass_fields__}
    return flag(help, default, metavar="PATH", call=Call(**call), **more)


def worked_out(default: Any = None) -> Any:
    """A field without a flag: it follows from others, or is known only inside the job."""
    return _field(default, {})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Declared:
    """A flag with its field."""

    name: str
    hint: Any
    default: Any
    flag: Flag
    owner: Owner

    @property
    def option(self) -> str:
        """The flag as it is given."""
        return self.flag.option or f"--{self.name.replace('_', '-')}"


def declared(group: type) -> tuple[Declared, ...]:
    """The flags of a group, in the order of their declaration."""
    hints = _hints(group)
    usual: Owner = getattr(group, "owner", "slime")
    return tuple(
        Declared(
            field.name,
            hints[field.name],
            default_of(field),
            field.metadata[_KEY],
            field.metadata[_KEY].owner or usual,
        )
        for field in dataclasses.fields(group)
        if _KEY in field.metadata
    )


@cache
def _hints(group: type) -> dict[str, Any]:
    """The types of a group's fields. A parser asks again and again, and each answer compiles every annotation."""
    return typing.get_type_hints(group)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; a fresh copy if it is mutable."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def add_group(parser: argparse.ArgumentParser, group: type) -> None:
    """Add a group's flags. The first paragraph of its docstring is their title, the rest their description."""
    title, _, rest = (group.__doc__ or "").partition("\n\n")
    hidden = [each.option for each in declared(group) if each.flag.help is None]
    title = title.strip().rstrip(".")
    section = parser.add_argument_group(
        title[0].lower() + title[1:], " ".join([*rest.split(), *hidden]) or None
    )
    for each in declared(group):
        options = [each.option, *([each.flag.older] if each.flag.older else [])]
        section.add_argument(*options, dest=each.name, default=each.default, **_how(each))


def _how(each: Declared) -> dict[str, Any]:
    """Arguments of `add_argument`: how the values are read."""
    kind = without_none(each.hint)
    how: dict[str, Any] = {"help": argparse.SUPPRESS if each.flag.help is None else each.flag.help}
    if kind is bool:
        return how | {"action": _switch(each)}
    if each.flag.metavar:
        how["metavar"] = each.flag.metavar
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
        how |= {"action": "append"} if each.flag.append else {"nargs": "*" if each.flag.empty else "+"}
    if typing.get_origin(kind) is Literal:
        return how | {"choices": list(typing.get_args(kind))}
    if typing.get_origin(kind) is dict:
        return how | {"type": json.loads}
    return how if kind is str else how | {"type": kind}


def _switch(each: Declared) -> Any:
    """A switch that is on by default, or whose default follows from other flags, has a `--no-` form too."""
    if each.default is True and each.flag.option:
        return "store_false"
    follows = each.default is None and each.flag.help is not None
    return argparse.BooleanOptionalAction if each.default is True or follows else "store_true"


def without_none(hint: Any) -> Any:
    """The annotation without `| None`."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    return next(each for each in typing.get_args(hint) if each is not type(None))


def check_ranges(groups: Iterable[Any]) -> None:
    """Check that every number is one, and within the limits that are declared.

    Raises:
        UserError: names the flag and its value.
    """
    for group in groups:
        for each in declared(type(group)):
            check_range(each.option, getattr(group, each.name), each.flag)


def check_range(what: str, value: Any, limits: Flag) -> None:
    """Check that one value is a number, where it should be, and within the limits.

    Args:
        what: the name by which a person gave it, for the message.

    Raises:
        UserError: says what is wrong.
    """
    least, most = limits.at_least, limits.at_most
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{what} is {value}: a number is needed.")
    if least is not None and value is not None and value < least:
        raise UserError(f"{what} is {value}: it must be at least {least}.")
    if most is not None and value is not None and value > most:
        raise UserError(f"{what} is {value}: it must be at most {most}.")
