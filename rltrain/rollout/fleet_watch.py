"""What the rollout process keeps an eye on while it generates: where the routers are, and external engines."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy

from rltrain.arguments.errors import UserError
from rltrain.arguments.external import external_token, external_urls, uses_external_engines
from rltrain.arguments.fleet import models, trained_model
from rltrain.rollout.http import HttpClient
from rltrain.runtime import Registry, RoleContext
from rltrain.sglang.external import ExternalFleet
from rltrain.sglang.routers import RouterAddress, find_router, set_routers, wait_for_router

_INTERVAL = 2.0  # seconds


class FleetWatch:
    """Tells generation functions, through `args`, where to send requests, also when a router is started again."""

    def __init__(
        self, args: argparse.Namespace, registry: Registry, context: RoleContext, client: HttpClient
    ) -> None:
        """Wait for the routers and set them; blocks."""
        self._args, self._given = args, copy.copy(args)  # what is set must not be taken for a flag
        self._registry, self._context, self._client = registry, context, client
        self._external = (
            ExternalFleet(args, context.layout, registry) if uses_external_engines(args) else None
        )
        count = len(models(args))
        self._set([wait_for_router(self._given, registry, context.token, i) for i in range(count)])

    async def run(self) -> None:
        """Look from time to time, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL)
            await asyncio.to_thread(self._look)

    def _look(self) -> None:
        try:
            found = [
                find_router(self._given, self._registry, self._context.token, i)
                for i in range(len(self._routers))
            ]
        except OSError:  # the supervisor is about to end, or busy
            return
        if all(found) and found != self._routers:
            self._set([each for each in found if each])
        if self._external:
            self._external.look(self._routers[trained_model(self._given)])
            self._client_tokens()

    def _client_tokens(self) -> None:
        """Requests are also stopped at the engines themselves."""
        with contextlib.suppress(OSError, UserError):
            for url in external_urls(self._given):
                self._client.set_token(url, external_token())

    def _set(self, routers: list[RouterAddress]) -> None:
        self._routers = routers
        set_routers(self._args, routers)
        for router in routers:
            self._client.set_token(router.url, router.token)
        self._client.refuse_unknown_weights(routers[trained_model(self._given)].url)
