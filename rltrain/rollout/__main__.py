"""`python -m rltrain.rollout`: the rollout role."""

from __future__ import annotations

import asyncio
import gc
import sys

if __name__ == "__main__":
    gc.disable()  # until `serve` has imported all; it stays, and looking for garbage in it takes a fifth longer

from rltrain.rollout.service.server import serve
from rltrain.run.errors import EXIT_NEVER_RESTART, run_main
from rltrain.run.lifeline import end_without_supervisor
from rltrain.run.role import RoleContext


def main() -> None:
    """Be the role that the supervisor asks for."""
    context = RoleContext.from_env()
    end_without_supervisor(context)
    asyncio.run(serve(context))


if __name__ == "__main__":
    sys.exit(run_main(main, EXIT_NEVER_RESTART))
