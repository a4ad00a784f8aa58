"""The router's process: `python -m rltrain.sglang.router_server`, its settings as JSON on stdin.

`program` is sglang-router or its successor smg, which has the same interface; `router_args` are its flags. They come
over stdin because the API key is one of them.
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace

PACKAGES = {"sglang-router": "sglang_router", "smg": "smg"}


def main() -> None:
    """Read the arguments and route until told to stop."""
    settings = json.load(sys.stdin)
    package = PACKAGES[settings["program"]]
    launch_router = importlib.import_module(f"{package}.launch_router").launch_router
    router_args = importlib.import_module(f"{package}.router_args").RouterArgs
    launch_router(router_args.from_cli_args(Namespace(**settings["router_args"])))


if __name__ == "__main__":
    main()
