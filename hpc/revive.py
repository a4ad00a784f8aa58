"""Start engines and routers that died again, each alone: a bounded number of times, and ever more slowly.

What was being generated on an engine is asked of the others by the router, or waits for this one. A new engine takes
the current weights before its first request (`rltrain/sglang/engine.py`), a new router the port of the one before.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from hpc.plan import RoleProcess
from hpc.registry import RegistryServer
from hpc.roles import EXIT_NEVER_RESTART, RunningRole

REVIVED = ("engine", "router")
_FIRST_DELAY = 1.0  # seconds; doubled each time

Starter = Callable[[RoleProcess, Mapping[str, str]], RunningRole]


class Revival:
    """Which of the dead are started again, and when."""

    def __init__(self, start: Starter, registry: RegistryServer, limit: int) -> None:
        """Start with `start`, each at most `limit` times in the attempt."""
        self._start, self._registry, self._limit = start, registry, limit
        self._counts: Counter[str] = Counter()
        self._urls: dict[str, str] = {}
        self._due: dict[RunningRole, float] = {}

    def takes(self, role: RunningRole, code: int) -> bool:
        """Whether a dead role is going to be started again.

        Not one that was never ready: it would fail in the same way.
        """
        if role in self._due:
            return True
        name = role.process.name
        if role.process.role not in REVIVED or code == EXIT_NEVER_RESTART or role.handle.lost_a_node():
            return False
        url = self._registry.url_of(role.process.role, role.process.index) or self._urls.get(name)
        if url is None or self._counts[name] >= self._limit:
            return False
        if role.process.role == "engine":  # a router is looked for where it was
            self._registry.forget(role.process.role, role.process.index)
        role.handle.terminate()  # an engine that spans nodes may have died on one of them only
        self._urls[name] = url
        self._due[role] = time.monotonic() + _FIRST_DELAY * 2 ** self._counts[name]
        self._counts[name] += 1
        return True

    def count(self, process: RoleProcess) -> int:
        """How often it has been started again."""
        return self._counts[process.name]

    def start_due(self) -> dict[RunningRole, RunningRole]:
        """Start those whose time has come; returns each by the one that it replaces."""
        started = {}
        for role in [role for role, due in self._due.items() if due <= time.monotonic()]:
            if not role.handle.has_ended():
                role.handle.kill()
                continue
            del self._due[role]
            name = role.process.name
            env = {"SLURMLIME_RESTARTS": str(self._counts[name]), "SLURMLIME_REPLACES": self._urls[name]}
            started[role] = self._start(role.process, env)
        return started
