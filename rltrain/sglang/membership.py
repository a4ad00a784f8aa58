"""An engine's place behind the router of its model, kept when that router dies and another one takes its place."""

from __future__ import annotations

import argparse
import contextlib
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from rltrain.arguments.fleet import engine_specs
from rltrain.processes import reserve_port
from rltrain.runtime import Registry, RoleContext
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.sglang.engines import ExpelledError, expulsion
from rltrain.sglang.http import HttpError
from rltrain.sglang.routers import RouterAddress, find_router, wait_for_router

_LEAVE_SECONDS = 5.0


@dataclass(frozen=True)
class Place:
    """Where an engine belongs.

    Attributes:
        model: position of its model, see `rltrain.arguments.fleet`.
        token: of the job.
        router_role: what the router is told of an engine that computes only prompts or only responses.
        server_args: arguments of the engine that go with that.
    """

    model: int
    token: str
    router_role: dict[str, Any] = field(default_factory=dict)
    server_args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, args: argparse.Namespace, context: RoleContext, held: ExitStack) -> Place:
        """The place of this engine role; a port that it needs is kept in `held`."""
        spec = engine_specs(args)[context.index]
        if spec.worker_type == "regular":
            return cls(spec.model, context.token)
        role: dict[str, Any] = {"worker_type": spec.worker_type}
        if spec.worker_type == "decode":
            return cls(spec.model, context.token, role)
        port = held.enter_context(reserve_port(context.host)).getsockname()[1]
        return cls(
            spec.model,
            context.token,
            role | {"bootstrap_port": port},
            {"disaggregation_bootstrap_port": port},
        )


class Membership:
    """Joins and leaves routers for an engine."""

    def __init__(
        self, engine: HttpServerEngineAdapter, args: argparse.Namespace, registry: Registry, place: Place
    ) -> None:
        self._engine, self._args, self._registry, self._place = engine, args, registry, place
        self._router: RouterAddress | None = None
        self._outdated: str | None = None

    def join_after(self, version: str) -> None:
        """Join as soon as the engine has other weights than those of this version, see `look`."""
        self._outdated = version

    def join(self) -> None:
        """Join the router as soon as there is one."""
        place = self._place
        self._join(wait_for_router(self._args, self._registry, place.token, place.model))

    def look(self) -> None:
        """Do what is due: join the router that has taken the place of the one that we joined; call once a second.

        Raises:
            ExpelledError: the trainer says that the engine has not got its weights.
        """
        place, engine = self._place, self._engine
        try:
            if reason := self._registry.offered(expulsion(engine.url, os.getpid())):
                raise ExpelledError(f"expelled by the trainer: {reason}")
            if self._outdated is not None and engine.get_weight_version() == self._outdated:
                return
            self._outdated = None
            router = find_router(self._args, self._registry, place.token, place.model)
            if router not in (None, self._router):
                self._join(router)
                print(f"joined the router {router.url}", flush=True)
        except (OSError, HttpError, TimeoutError) as error:  # it is not up yet, or has gone again
            print(f"the router can't be joined yet: {error}", flush=True)

    def leave(self) -> None:
        """Leave the router, if it still answers: it must not send requests to an engine that is gone."""
        if self._router is None:
            return
        with contextlib.suppress(OSError, HttpError, TimeoutError):
            self._engine.unregister(self._router.url, _LEAVE_SECONDS, self._router.token)

    def _join(self, router: RouterAddress) -> None:
        self._engine.register(router.url, router_token=router.token, **self._place.router_role)
        self._router = router
