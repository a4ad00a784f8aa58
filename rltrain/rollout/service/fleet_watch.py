"""Watches the routers and external engines while the rollout process generates."""

from __future__ import annotations

import asyncio
import contextlib

from rltrain.arguments.config import Config
from rltrain.arguments.external import external_token, external_urls
from rltrain.arguments.fleet import count_models, trained_model
from rltrain.rollout.generate.http import HttpClient
from rltrain.run.errors import UserError
from rltrain.run.http import HttpError
from rltrain.run.role import Registry, RoleContext
from rltrain.sglang.external import ExternalFleet
from rltrain.sglang.routers import RouterAddress, find_router, set_routers, wait_for_router

_INTERVAL = 2.0  # seconds


class FleetWatch:
    """Tells generation functions, through `args`, where to send requests, also when a router is started again."""

    def __init__(self, config: Config, registry: Registry, context: RoleContext, client: HttpClient) -> None:
        """Wait for the routers and set them; blocks."""
        self._config = config
        self._registry, self._context, self._client = registry, context, client
        self._external = (
            ExternalFleet(config.engines, config.model, context.layout, registry)
            if config.engines.are_external
            else None
        )
        count = count_models(config.engines)
        self._set([wait_for_router(config.engines, registry, context.token, i) for i in range(count)])

    async def run(self) -> None:
        """Look from time to time, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL)
            await asyncio.to_thread(self._look)

    def _look(self) -> None:
        try:
            found = [
                find_router(self._config.engines, self._registry, self._context.token, i)
                for i in range(len(self._routers))
            ]
        except (OSError, HttpError):  # the supervisor is about to end, or busy
            return
        if all(found) and found != self._routers:
            self._set([each for each in found if each])
        if self._external:
            self._external.look(self._routers[trained_model(self._config.engines)])
            self._client_tokens()

    def _client_tokens(self) -> None:
        """Requests are also stopped at the engines themselves."""
        with contextlib.suppress(OSError, UserError):
            for url in external_urls(self._config.engines):
                self._client.set_token(url, external_token())

    def _set(self, routers: list[RouterAddress]) -> None:
        self._routers = routers
        set_routers(self._config, routers)
        for router in routers:
            self._client.set_token(router.url, router.token)
        self._client.refuse_unknown_weights(routers[trained_model(self._config.engines)].url)
