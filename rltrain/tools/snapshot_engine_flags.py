"""Write `engine_flags.txt`: which flags the installed SGLang server and router take, and of which kind.

A login node has neither package, yet a typo in `--sglang-…` should be found there and not after an hour in
the queue. Run `python -m rltrain.tools.snapshot_engine_flags` after changing either pin; a test compares the file
with the installed packages.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rltrain import arguments

SNAPSHOT = Path(arguments.__file__).with_name("engine_flags.txt")


def describe(prefix: str, parser: argparse.ArgumentParser) -> list[str]:
    """One line a flag: prefix, flag without dashes, kind (bool, int, float, str, json, list or ints)."""
    lines = []
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--") and option != "--help":
                lines.append(f"{prefix} {option[2:]} {_kind(action)}")
    return sorted(set(lines))


def _kind(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "bool"
    if action.nargs in ("*", "+") or isinstance(action.nargs, int):
        return "ints" if action.type is int else "list"
    # SGLang has converters of its own (json.loads, "64k" as a number): tell them by what they make of a text.
    for text in ("{}", "[]", "1"):
        kind = _KIND_OF.get(type(_converted(action, text)))
        if kind:
            return kind
    return "str"


_KIND_OF: dict[type, str] = {dict: "json", list: "json", int: "int", float: "float"}


def _converted(action: argparse.Action, text: str) -> Any:
    """What the flag's converter makes of `text`; None if it refuses it."""
    try:
        return action.type(text) if callable(action.type) else text
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return None


def installed_flags() -> list[str]:
    """The lines for the packages that are installed here; imports SGLang (seconds)."""
    from rltrain.sglang import cpu

    cpu.install()
    from sglang.srt.server_args import ServerArgs
    from sglang_router.router_args import RouterArgs

    server, router = argparse.ArgumentParser(), argparse.ArgumentParser()
    ServerArgs.add_cli_args(server)
    RouterArgs.add_cli_args(router)
    return describe("sglang", server) + describe("router", router)


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(installed_flags()) + "\n")
