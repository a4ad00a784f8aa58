"""`--sglang-*` and `--router-*`: flags of the SGLang server and of its router, handed through.

Which exist is read from `engine_flags.txt` (see `rltrain/tools/snapshot_engine_flags.py`), so that this needs neither
package.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        "config",  # a flag of our own: slime has it too
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


@dataclass(frozen=True)
class Rename:
    """What an old flag of SGLang is now.

    Attributes:
        name: The present flag, without `--`.
        since: The version of SGLang that brought it.
        value: What a switch has become, where the present flag takes a value.
        values: Values that have other names, too.
    """

    name: str
    since: str
    value: str | None = None
    values: Mapping[str, str] = field(default_factory=dict)


# Old flags of SGLang servers that launch scripts still have, found by comparing the command lines of SGLang 0.5.9 to
# 0.5.23; 0.5.20 dropped all of them.
RENAMED = {
    "cuda-graph-bs": Rename("cuda-graph-bs-decode", "0.5.14"),
    "cuda-graph-max-bs": Rename("cuda-graph-max-bs-decode", "0.5.14"),
    "disable-piecewise-cuda-graph": Rename("cuda-graph-backend-prefill", "0.5.14", value="disabled"),
    "enable-breakable-cuda-graph": Rename("cuda-graph-backend-prefill", "0.5.14", value="breakable"),
    "enable-nsa-prefill-context-parallel": Rename("enable-prefill-cp", "0.5.14"),
    "enforce-piecewise-cuda-graph": Rename("cuda-graph-backend-prefill", "0.5.14", value="tc_piecewise"),
    "mamba-scheduler-strategy": Rename("mamba-radix-cache-strategy", "0.5.14"),
    "nsa-decode-backend": Rename("dsa-decode-backend", "0.5.13"),
    "nsa-prefill-backend": Rename("dsa-prefill-backend", "0.5.13"),
    "nsa-prefill-cp-mode": Rename(
        "cp-strategy", "0.5.14", values={"in-seq-split": "zigzag", "round-robin-split": "interleave"}
    ),
    "piecewise-cuda-graph-max-tokens": Rename("cuda-graph-max-bs-prefill", "0.5.14"),
    "piecewise-cuda-graph-tokens": Rename("cuda-graph-bs-prefill", "0.5.14"),
    "speculative-dflash-draft-window-size": Rename("speculative-draft-window-size", "0.5.12"),
    "stream-output": Rename("incremental-streaming-output", "0.5.10"),
}


@cache
def engine_flags() -> dict[str, dict[str, str]]:
    """`{"sglang": {flag: kind}, "router": {…}}`; kinds are as in `snapshot_engine_flags`."""
    flags: dict[str, dict[str, str]] = {"sglang": {}, "router": {}}
    for line in Path(__file__).with_name("engine_flags.txt").read_text().splitlines():
        prefix, flag, kind = line.split()
        if flag not in RESERVED[prefix]:
            flags[prefix][flag] = kind
    return flags


class _Store(argparse.Action):
    """Store the value in the namespace's `sglang` or `router` dict under the flag's present name."""

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
        if (old := (option_string or "").removeprefix("--sglang-")) in RENAMED:
            rename = RENAMED[old]
            given[name] = rename.value or rename.values.get(str(values), given[name])
            namespace.ignored_flags = sorted({*getattr(namespace, "ignored_flags", []), f"sglang-{old}"})
        setattr(namespace, prefix, given)


def add_passthrough_flags(parser: argparse.ArgumentParser) -> None:
    """Add all of them; they do not appear one by one in `--help`."""
    group = parser.add_argument_group(
        "engine and router",
        "--sglang-FLAG hands --FLAG to every SGLang server, --router-FLAG to its router:"
        " every flag of sglang.launch_server and sglang_router.launch_router is accepted.",
    )
    for prefix, flags in engine_flags().items():
        for flag, kind in flags.items():
            group.add_argument(
                f"--{prefix}-{flag}",
                *(_older(flag) if prefix == "sglang" else _SLIMES_ROUTER_FLAGS.get(flag, ())),
                action=_Store,
                dest=f"{prefix}_{flag.replace('-', '_')}",
                nargs=0 if kind == "bool" else "+" if kind in ("list", "ints") else None,
                type=_TYPES.get(kind, str),
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
    for old, rename in RENAMED.items():
        if rename.value is not None:
            dest = f"sglang_{rename.name.replace('-', '_')}"
            group.add_argument(
                f"--sglang-{old}",
                action=_Store,
                dest=dest,
                nargs=0,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


# slime has one flag of the router with a name of its own.
_SLIMES_ROUTER_FLAGS = {"request-timeout-secs": ["--sglang-router-request-timeout-secs"]}


def _older(flag: str) -> list[str]:
    """Older names of a flag of SGLang that took the same kind of value."""
    return [f"--sglang-{old}" for old, now in RENAMED.items() if now.name == flag and now.value is None]
