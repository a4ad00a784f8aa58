"""The router's process: `python -m rltrain.sglang.router_server`, its settings as JSON on stdin.

`program` is sglang-router or its successor smg, which has the same interface; `router_args` are its flags. They come
over stdin because the API key is one of them.
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from typing import Any

PACKAGES = {"sglang-router": "sglang_router", "smg": "smg"}


def main() -> None:
    """Read the arguments and route until told to stop."""
    settings = json.load(sys.stdin)
    launch_router, router_args = load(settings["program"])
    launch_router(router_args.from_cli_args(Namespace(**settings["router_args"])))


def load(program: str) -> tuple[Any, Any]:
    """The router's function that serves, and the class of its arguments."""
    # A load balancer for tests, which is imported with the router, looks for a module that SGLang no longer has, and
    # would load SGLang and torch for it: nearly all of the router's start and memory.
    sys.modules.setdefault("sglang", None)  # type: ignore[arg-type]
    package = PACKAGES[program]
    launch_router = importlib.import_module(f"{package}.launch_router").launch_router
    return launch_router, importlib.import_module(f"{package}.router_args").RouterArgs


if __name__ == "__main__":
    main()
