"""`--sglang-*` and `--router-*`: flags of the SGLang server and of its router, handed through.

Which exist is read from `engine_flags.txt` (see `snapshot.py`), so that this needs neither package.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# Set by the job itself: an engine that listened elsewhere or served another model would not be found.
RESERVED = {
    "sglang": {
        "host",
        "port",
        "model-path",
        "model",
        "api-key",
        "tp-size",
        "tensor-parallel-size",
        "device-id",
        "config",  # a flag of ours, as it is one of slime's
    },
    # With certificates of its own the router would no longer be found under http://.
    "router": {
        "host",
        "port",
        "worker-urls",
        "prometheus-port",
        "api-key",
        "model-path",
        "tls-cert-path",
        "tls-key-path",
    },
}
_TYPES: dict[str, Callable[[str], Any]] = {
    "int": int, "float": float, "str": str, "list": str, "ints": int, "json": json.loads,
}  # fmt: skip


@cache
def engine_flags() -> dict[str, dict[str, str]]:
    """`{"sglang": {flag: kind}, "router": {…}}`; kinds are those of `snapshot.py`."""
    flags: dict[str, dict[str, str]] = {"sglang": {}, "router": {}}
    for line in Path(__file__).with_name("engine_flags.txt").read_text().splitlines():
        prefix, flag, kind = line.split()
        if flag not in RESERVED[prefix]:
            flags[prefix][flag] = kind
    return flags


class _Store(argparse.Action):
    """Store the value in the namespace's `sglang` or `router` dict under the flag's own name."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        prefix, _, name = self.dest.partition("_")
        given = dict(getattr(namespace, prefix, None) or {})
        given[name] = True if self.nargs == 0 else values
        setattr(namespace, prefix, given)


def add_passthrough_flags(parser: argparse.ArgumentParser) -> None:
    """Add all of them; they do not appear one by one in `--help`."""
    group = parser.add_argument_group(
        "engine and router",
        "--sglang-FLAG hands --FLAG to every SGLang server, --router-FLAG to its router:"
        " every flag of sglang.launch_server and sglang_router.launch_router is known.",
    )
    parser.set_defaults(sglang={}, router={})
    for prefix, flags in engine_flags().items():
        for flag, kind in flags.items():
            group.add_argument(
                f"--{prefix}-{flag}",
                action=_Store,
                dest=f"{prefix}_{flag.replace('-', '_')}",
                nargs=0 if kind == "bool" else "+" if kind in ("list", "ints") else None,
                type=_TYPES.get(kind, str),
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
