"""The engines of a job as the trainer finds them: looked up anew each time, as one that died is started again."""

from __future__ import annotations

import argparse
import socket
import time
from urllib.parse import urlsplit

from rltrain.arguments.external import external_token, external_urls, uses_external_engines
from rltrain.arguments.fleet import trained_engines
from rltrain.runtime import Registry, RoleAddress
from rltrain.sglang.adapter import HttpServerEngineAdapter

# The supervisor sees a dead process within a second or two.
_DEATH_SECONDS = 30.0
_POLL_SECONDS = 0.2


class ExpelledError(RuntimeError):
    """The trainer could not give the engine its weights; the message says why."""


class JobEngine(HttpServerEngineAdapter):
    """One engine of the job, at the address that it has now."""

    def __init__(self, address: RoleAddress, token: str, registry: Registry) -> None:
        super().__init__(address.url, token)
        self._registry, self._pid = registry, address.pid
        self.is_here = address.host == socket.gethostname()

    def has_died(self) -> bool:
        """Whether the supervisor says so; waits for its word, as an engine that does not answer may be about to."""
        deadline = time.monotonic() + _DEATH_SECONDS
        while any(address.url == self.url for address in self._registry.find("engine")):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def expel(self, reason: str) -> None:
        """Have its own role end it, for which the supervisor starts another one."""
        self._registry.offer(expulsion(self.url, self._pid), reason)


def expulsion(url: str, pid: int) -> str:
    """Name of the offer by which the role of this process id learns why it has to end the engine at `url`."""
    return f"expelled-{pid}-{urlsplit(url).netloc}"


class ExternalEngine(HttpServerEngineAdapter):
    """One that the job does not start."""

    is_ours = False
    is_here = False

    def has_died(self) -> bool:
        """Whether it is gone; `rltrain.sglang.external` gives it the weights when it comes back."""
        return not self.makes_progress()

    def expel(self, reason: str) -> None:
        """Nothing: without the current weights `rltrain.sglang.external` takes it off the router."""


def find_engines(
    args: argparse.Namespace, registry: Registry, token: str
) -> list[JobEngine | ExternalEngine]:
    """The engines that are ready now and take the trainer's weights: the job's by index, then external ones."""
    trained = trained_engines(args)
    own = [
        JobEngine(address, token, registry) for address in registry.find("engine") if address.index in trained
    ]
    return [*own, *(engine for engine in external_engines(args) if engine.makes_progress())]


def external_engines(args: argparse.Namespace) -> list[ExternalEngine]:
    """The external engines that are named now, whether they answer or not."""
    if not uses_external_engines(args):
        return []
    token = external_token()
    return [ExternalEngine(url, token) for url in external_urls(args)]
