"""The router's process: `python -m rltrain.sglang.router_server`, its settings as JSON on stdin.

`program` is sglang-router or its successor smg, which has the same interface; `router_args` are its flags. They come
over stdin because the API key is one of them.
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from types import ModuleType
from typing import Any

PACKAGES = {"sglang-router": "sglang_router", "smg": "smg"}


def main() -> None:
    """Read the arguments and route until told to stop."""
    settings = json.load(sys.stdin)
    args = Namespace(**settings["router_args"])
    launch_router, router_args = load(settings["program"], mini_lb=getattr(args, "mini_lb", False))
    launch_router(router_args.from_cli_args(args))


def load(program: str, *, mini_lb: bool = False) -> tuple[Any, Any]:
    """The router's function that serves, and the class of its arguments.

    Args:
        mini_lb: Whether its load balancer for tests will be asked for, which is imported with the router. It would load
            a web framework for itself, and SGLang and torch: nearly all of the router's start and memory.
    """
    package = PACKAGES[program]
    sys.modules.setdefault("sglang", None)  # type: ignore[arg-type]  # it looks there for what SGLang no longer has
    if not mini_lb:
        stand_in = ModuleType(f"{package}.mini_lb")
        vars(stand_in)["MiniLoadBalancer"] = None
        sys.modules.setdefault(stand_in.__name__, stand_in)
    launch_router = importlib.import_module(f"{package}.launch_router").launch_router
    return launch_router, importlib.import_module(f"{package}.router_args").RouterArgs


if __name__ == "__main__":
    main()
