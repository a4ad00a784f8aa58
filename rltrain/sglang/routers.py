"""The routers of a job, one for each model that it serves: where they are, and which engines they send requests to.

A router is found in the registry, or named by the flags. Current routers have `/workers`, which answers at once (202)
and works in the background; older ones have `/add_worker?url=…`, which is done when it answers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from rltrain.arguments.config import Config
from rltrain.arguments.external import external_token
from rltrain.arguments.fleet import count_models, models, trained_model
from rltrain.arguments.groups.engines import Engines
from rltrain.run.http import HttpError, call, in_brackets, make_url
from rltrain.run.role import Registry

_ROLE = "router"
_POLL_INTERVAL = 0.1


@dataclass(frozen=True)
class RouterAddress:
    """A router and the token that it asks for; `pid` changes when it is started again, and is 0 if unknown."""

    url: str
    token: str
    pid: int = 0

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The parts of the URL, as slime's `args.sglang_router_ip` and `_port` have them.

        IPv6 is in brackets, as functions put it into URLs.
        """
        parts = urlsplit(self.url)
        assert parts.hostname and parts.port
        return in_brackets(parts.hostname), parts.port


def external_router(engines: Engines) -> RouterAddress | None:
    """The router that the flags name, or None."""
    if engines.sglang_router_ip is None:
        return None
    assert engines.sglang_router_port is not None
    url = make_url(engines.sglang_router_ip, engines.sglang_router_port)
    return RouterAddress(url, external_token())


def find_router(engines: Engines, registry: Registry, token: str, model: int) -> RouterAddress | None:
    """The present router of a model; None while there is none."""
    if router := external_router(engines):
        return router
    return next(
        (RouterAddress(each.url, token, each.pid) for each in registry.find(_ROLE) if each.index == model),
        None,
    )


def wait_for_router(engines: Engines, registry: Registry, token: str, model: int) -> RouterAddress:
    """The same, as soon as there is one.

    Raises:
        TimeoutError: there was none for too long.
    """
    if external_router(engines) is None:
        registry.wait_for(_ROLE, count_models(engines))
    router = find_router(engines, registry, token, model)
    assert router is not None
    return router


def set_routers(config: Config, routers: list[RouterAddress]) -> None:
    """Put the routers, one per model, where rollout and reward functions look: slime's names.

    `args.sglang_model_routers` has all by the model's name, `args.sglang_router_ip` and `_port` are those of the model
    that samples come from.
    """
    args, served = config.namespace, models(config.engines, config.model.hf_checkpoint)
    args.sglang_model_routers = {
        model["name"]: router.host_and_port for model, router in zip(served, routers, strict=True)
    }
    args.sglang_router_ip, args.sglang_router_port = routers[trained_model(config.engines)].host_and_port


def get_model_url(args: argparse.Namespace, name: str, endpoint: str = "/generate") -> str:
    """Where the model `name` of `--sglang-config` answers; slime's name and arguments.

    Raises:
        ValueError: the run serves no such model.
    """
    routers = args.sglang_model_routers
    if name not in routers:
        raise ValueError(
            f"this run serves no model {name!r}, but {', '.join(map(repr, routers))}: see --sglang-config"
        )
    host, port = routers[name]
    return f"http://{host}:{port}{endpoint}"


def add_worker(router_url: str, token: str, worker: dict[str, Any], timeout: float = 120.0) -> None:
    """Add an engine, and wait until the router considers it healthy.

    Args:
        router_url: of the router.
        token: that the router asks for.
        worker: `url`, the `api_key` that the engine asks for, and what else the router takes, such as `worker_type`.
        timeout: in seconds.

    Raises:
        HttpError: the router refused.
        TimeoutError: it accepted, but the engine was not in use within `timeout` seconds.
    """
    worker_url = worker["url"]
    try:
        call("POST", f"{router_url}/workers", token, worker)
    except HttpError as error:
        if error.status not in (404, 405):
            raise
        call("POST", f"{router_url}/add_worker?{urlencode({'url': worker_url})}", token)
        return

    def in_use() -> bool:
        worker = find_worker(router_url, token, worker_url)
        return worker is not None and worker["is_healthy"]

    _wait(in_use, timeout, f"the router {router_url} did not start using {worker_url}")


def remove_worker(router_url: str, token: str, worker_url: str, timeout: float = 60.0) -> None:
    """Take the engine at `worker_url` off the router, and wait until it is off; a missing engine is fine.

    Raises:
        HttpError: the router refused.
        TimeoutError: it accepted, but still had the engine after `timeout` seconds.
    """
    try:
        worker = find_worker(router_url, token, worker_url)
    except HttpError as error:
        if error.status not in (404, 405):
            raise
        call("POST", f"{router_url}/remove_worker?{urlencode({'url': worker_url})}", token)
        return
    if worker is not None:
        call("DELETE", f"{router_url}/workers/{worker['id']}", token)
        _wait(
            lambda: find_worker(router_url, token, worker_url) is None,
            timeout,
            f"the router {router_url} still had {worker_url}",
        )


def find_worker(router_url: str, token: str, worker_url: str) -> dict[str, Any] | None:
    """The router's record of the engine at `worker_url`, or None."""
    workers = call("GET", f"{router_url}/workers", token)["workers"]
    return next((worker for worker in workers if worker["url"] == worker_url), None)


def _wait(condition: Callable[[], bool], timeout: float, complaint: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{complaint} within {timeout:.0f} s")
        time.sleep(_POLL_INTERVAL)
