"""What the roles that watch a server have in common: end cleanly on SIGTERM, and say why otherwise."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType

from rltrain.arguments.errors import UserError
from rltrain.runtime import EXIT_NEVER_RESTART, RoleContext
from rltrain.sglang.engines import ExpelledError
from rltrain.sglang.health import HungError
from rltrain.sglang.process import ServerDiedError


def run_server_role(main: Callable[[RoleContext], None]) -> None:
    """Run `main` as this process: exit 0 when told to stop, 93 on bad input, 1 when the server died."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        main(RoleContext.from_env())
    except UserError as error:
        _fail(error, EXIT_NEVER_RESTART)
    except (ServerDiedError, HungError, ExpelledError, TimeoutError) as error:
        _fail(error, 1)


def _stop(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the clean-up must not be interrupted by a second one
    sys.exit(0)


def _fail(error: Exception, code: int) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(code)
