"""The router's process: `python -m rltrain.sglang.router_server PARENT_PID`, `RouterArgs` as JSON on stdin."""

from __future__ import annotations

import json
import sys

from rltrain.processes import die_with_parent


def main() -> None:
    """Read the arguments and route until told to stop."""
    die_with_parent(int(sys.argv[1]))
    router_args = json.load(sys.stdin)
    from sglang_router.launch_router import launch_router
    from sglang_router.router_args import RouterArgs

    launch_router(RouterArgs(**router_args))


if __name__ == "__main__":
    main()
