"""Rollouts in the test's own process: with a fake engine, its client and the reward processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from conftest import TOKEN
from fakes.engine_server import FakeEngine, fake_engine

from rltrain.arguments.config import Config
from rltrain.data.source import RolloutDataSource
from rltrain.rewards import pool as rewards
from rltrain.rollout.generate.http import HttpClient, set_client
from rltrain.rollout.service.manager import RolloutManager
from rltrain.rollout.sglang_rollout import generate_rollout
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample

T = TypeVar("T", bound=FakeEngine)


def layout(config: Config) -> RunLayout:
    """The run directory of this configuration."""
    return RunLayout(Path(config.rollout.rollout_state_dir).parents[1])


def manager(config: Config, attempt: int = 0) -> RolloutManager:
    """The manager of an attempt in that run directory."""
    return RolloutManager(config, layout(config), attempt)


@asynccontextmanager
async def http_client(config: Config | None, url: str) -> AsyncIterator[HttpClient]:
    """The client of the rollout process; `config` names the router at `url`. Rewards end with it."""
    if config is not None:
        address = urlsplit(url)
        config.namespace.sglang_router_ip, config.namespace.sglang_router_port = (
            address.hostname,
            address.port,
        )
    client = HttpClient(TOKEN)
    set_client(client)
    try:
        yield client
    finally:
        set_client(None)
        await rewards.close()
        await client.close()


@asynccontextmanager
async def running(config: Config, kind: type[T]) -> AsyncIterator[T]:
    """A fake engine of this kind, to which the configuration leads."""
    async with fake_engine(TOKEN, kind) as engine, http_client(config, engine.url):
        yield engine


def with_engine(use: Callable[[FakeEngine, HttpClient], Awaitable[Any]], config: Config | None = None) -> Any:
    """Run `use` with a fake engine, its client and, given a configuration, the rewards."""

    async def main() -> Any:
        async with fake_engine(TOKEN) as engine, http_client(config, engine.url) as client:
            return await use(engine, client)

    return asyncio.run(main())


def run_rollout(config: Config, faults: list[int | str] | None = None) -> tuple[FakeEngine, list[Sample]]:
    """One rollout of the default function; the engine answers with the faults first."""

    async def use(engine: FakeEngine, client: HttpClient) -> tuple[FakeEngine, list[Sample]]:
        engine.faults = list(faults or [])
        output = await generate_rollout(config.namespace, 0, RolloutDataSource(config.namespace))
        return engine, [sample for group in output.samples for sample in group]

    return with_engine(use, config)
