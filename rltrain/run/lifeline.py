"""A role ends itself when its supervisor is gone for good. Standard library only.

The supervisor ends its roles, and Slurm ends a job's steps. Neither can on a node that is cut off from the network, or
whose slurmstepd has died: the role would hold its GPUs for ever.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from http import HTTPStatus

from rltrain.run import http
from rltrain.run.role import RoleContext

PATIENCE_SECONDS = 300.0  # longer than any pause of the supervisor that a run survives
_KILL_SECONDS = 30.0  # to clean up
_TO_SAY_SECONDS = 1.0  # why it ends
_ASKED_IN_PATIENCE = 5


def end_without_supervisor(context: RoleContext, patience: float = PATIENCE_SECONDS) -> None:
    """From now on, end this process when the supervisor has not answered for `patience` seconds.

    First by the signal that says it to a role (SIGTERM, on Slurm SIGUSR1), then by SIGKILL. The supervisor is asked a
    few times within `patience`, so thousands of roles cost it little.
    """
    threading.Thread(target=_watch, args=(context, patience), name="lifeline", daemon=True).start()


def _watch(context: RoleContext, patience: float) -> None:
    interval = patience / _ASKED_IN_PATIENCE
    answered = time.monotonic()
    while time.monotonic() - answered < patience:
        time.sleep(interval * random.uniform(0.8, 1.2))
        try:
            http.call("GET", context.registry_url + "/stop", context.token, timeout=interval)
            answered = time.monotonic()
        except http.HttpError as error:
            if error.status != HTTPStatus.UNAUTHORIZED:  # else another attempt's has its port now
                answered = time.monotonic()
        except OSError:
            pass
    words = f"the supervisor at {context.registry_url} has not answered for {patience:.0f} s: ending"
    # A thread of its own: with the network the log's disk may be gone, and a write waits for it.
    threading.Thread(target=print, args=(words,), kwargs={"flush": True}, daemon=True).start()
    time.sleep(_TO_SAY_SECONDS)
    _end()


def _end() -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])  # as in the thread that started this one
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if number not in blocked:
            os.kill(os.getpid(), number)
            time.sleep(_KILL_SECONDS)
            break
    os.kill(os.getpid(), signal.SIGKILL)
