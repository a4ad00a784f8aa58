"""`python -m rltrain.rollout`: the rollout role."""

from __future__ import annotations

import asyncio
import sys

from rltrain.arguments.errors import UserError
from rltrain.rollout.server import serve
from rltrain.runtime import EXIT_NEVER_RESTART, RoleContext

if __name__ == "__main__":
    try:
        asyncio.run(serve(RoleContext.from_env()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_NEVER_RESTART)
