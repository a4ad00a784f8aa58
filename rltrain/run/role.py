"""A role's side of the job: who am I, where are the others, what happened.

The supervisor starts every role with `SLURMLIME_*` variables and keeps a small HTTP registry (the server
is `hpc/supervisor/registry.py`). Roles announce their address there, wait for each other there, and report events.
Standard library only.
"""

from __future__ import annotations

import os
import socket
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.run import finished, http
from rltrain.run.errors import NoSupervisorError
from rltrain.run.layout import RunLayout
from rltrain.run.processes import way_to

_LONG_POLL_SECONDS = 20.0
# A supervisor that says nothing may wait for the run's disk, which can stop for minutes. Whether it is gone for good is
# for `rltrain.run.lifeline` to say, which is sooner.
_ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class RoleAddress:
    """Where a role listens."""

    role: str
    index: int
    url: str
    pid: int
    host: str


@dataclass(frozen=True)
class RoleContext:
    """What the supervisor told this process about its place in the job."""

    run_dir: Path
    attempt: int
    role: str
    index: int
    registry_url: str
    token: str
    restarts: int = 0  # of this process within the attempt
    replaces: str | None = None  # URL at which the one before listened
    node_rank: int = 0  # of a process that spans nodes
    nnodes: int = 1

    @classmethod
    def from_env(cls) -> RoleContext:
        """Read the `SLURMLIME_*` variables.

        Raises:
            RuntimeError: the process was not started by a supervisor.
        """
        try:
            return cls(
                run_dir=Path(os.environ["SLURMLIME_RUN_DIR"]),
                attempt=int(os.environ["SLURMLIME_ATTEMPT"]),
                role=os.environ["SLURMLIME_ROLE"],
                index=int(os.environ["SLURMLIME_INDEX"]),
                registry_url=os.environ["SLURMLIME_REGISTRY"],
                token=os.environ["SLURMLIME_TOKEN"],
                restarts=int(os.environ.get("SLURMLIME_RESTARTS", 0)),
                replaces=os.environ.get("SLURMLIME_REPLACES") or None,
                node_rank=int(os.environ.get("SLURMLIME_NODE_RANK", 0)),
                nnodes=int(os.environ.get("SLURMLIME_NNODES", 1)),
            )
        except KeyError as error:
            raise RuntimeError(
                f"{error.args[0]} is not set: this program is one role of a job and is started by its"
                " supervisor. Start a job with `python -m hpc.submit`."
            ) from None

    @property
    def layout(self) -> RunLayout:
        """The run's paths."""
        return RunLayout(self.run_dir)

    @property
    def host(self) -> str:
        """This machine's address as the job's other machines reach it: the one that leads to the registry.

        Loopback when the registry is on loopback, so that a job on one machine is not visible outside.
        """
        parts = urllib.parse.urlsplit(self.registry_url)
        assert parts.hostname and parts.port
        return way_to(parts.hostname, parts.port)


class Registry:
    """Client of the supervisor's registry."""

    def __init__(self, context: RoleContext) -> None:
        self._context = context

    def register(self, url: str) -> None:
        """Announce that this role is ready and listens at `url`."""
        context = self._context
        self._call("POST", "/roles", {
            "role": context.role, "index": context.index, "url": url,
            "pid": os.getpid(), "host": socket.gethostname(),
        })  # fmt: skip

    def wait_for(self, role: str, count: int = 1, timeout: float = 600.0) -> list[RoleAddress]:
        """The first `count` instances of `role`, by index, as soon as all have registered.

        Raises:
            TimeoutError: they have not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            wait = max(0.0, min(_LONG_POLL_SECONDS, deadline - time.monotonic()))
            answer = self._call("GET", f"/roles/{role}?count={count}&wait={wait:.3f}")
            found = [RoleAddress(**entry) for entry in answer["roles"]]
            if len(found) >= count:
                return found[:count]
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"only {len(found)} of {count} {role} processes were ready after {timeout:.0f} s"
                )

    def find(self, role: str) -> list[RoleAddress]:
        """The instances of `role` that are ready now, by index."""
        answer = self._call("GET", f"/roles/{role}?count=0&wait=0")
        return [RoleAddress(**entry) for entry in answer["roles"]]

    def offer(self, name: str, value: str) -> None:
        """Leave a word for those that `await_offer`; one of this name is replaced."""
        self._call("POST", "/offers", {"name": name, "value": value})

    def offered(self, name: str) -> str | None:
        """The word that another process offers under `name` now."""
        return self._call("GET", f"/offers/{name}?wait=0")["value"]

    def await_offer(self, name: str, timeout: float = 600.0) -> str:
        """The word that another process offers under `name`.

        Raises:
            TimeoutError: no role has within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            wait = max(0.0, min(_LONG_POLL_SECONDS, deadline - time.monotonic()))
            answer = self._call("GET", f"/offers/{name}?wait={wait:.3f}")
            if answer["value"] is not None:
                return answer["value"]
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no role offered {name} within {timeout:.0f} s")

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event to the run's `events.jsonl`."""
        self._call("POST", "/events", {"kind": kind, "role": self._context.role, **fields})

    def prove_finished(self, steps: int, checkpoint: int | None = None) -> None:
        """Write that the run is finished, and say so. Called once, when every rank is done. See `rltrain.run.finished`.

        Args:
            steps: all that were asked for.
            checkpoint: number of the checkpoint that has the last weights; None for a run that saves none.
        """
        proof = finished.Finish(steps, self._context.attempt, checkpoint)
        finished.write_finish(self._context.layout, proof)
        self.event(finished.EVENT, steps=steps, checkpoint=checkpoint)

    def status(self, phase: str, step: int | None = None, **fields: Any) -> None:
        """Tell what the run does now; shown by the live view."""
        self._call("POST", "/status", {"phase": phase, "step": step, **fields})

    def stop_requested(self) -> str | None:
        """Why the job should save and stop at the next step boundary, or None."""
        return self._call("GET", "/stop")["reason"]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        context = self._context
        try:
            return http.call(method, context.registry_url + path, context.token, body, _ANSWER_SECONDS)
        except OSError as error:
            raise NoSupervisorError(
                f"the supervisor at {context.registry_url} does not answer: {error}. It has ended, or it is waiting"
                " for the run's disk."
            ) from error
