"""The engines of a job as the trainer finds them: looked up anew each time, as one that died is started again."""

from __future__ import annotations

import time

from rltrain.runtime import Registry
from rltrain.sglang.adapter import HttpServerEngineAdapter

# The supervisor sees a dead process within a second or two.
_DEATH_SECONDS = 30.0
_POLL_SECONDS = 0.2


class JobEngine(HttpServerEngineAdapter):
    """One engine of the job, at the address that it has now."""

    def __init__(self, url: str, token: str, registry: Registry) -> None:
        super().__init__(url, token)
        self._registry = registry

    def has_died(self) -> bool:
        """Whether the supervisor says so; waits for its word, as an engine that does not answer may be about to."""
        deadline = time.monotonic() + _DEATH_SECONDS
        while any(address.url == self.url for address in self._registry.find("engine")):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True


def find_engines(registry: Registry, token: str) -> list[JobEngine]:
    """The engines that are ready now, by index."""
    return [JobEngine(address.url, token, registry) for address in registry.find("engine")]
