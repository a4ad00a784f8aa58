"""The router role: `python -m rltrain.sglang.router` runs the real sglang-router and announces it."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from typing import Any, Self
from urllib.parse import urlsplit

from rltrain import arguments
from rltrain.arguments.fleet import is_disaggregated
from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.run.errors import UserError
from rltrain.run.http import in_brackets, make_url
from rltrain.run.processes import reserve_port
from rltrain.run.role import Registry, RoleContext
from rltrain.sglang.process import READY_TIMEOUT, ServerProcess, run_server_role
from rltrain.sglang.router_server import PACKAGES

# Until caches are large, no engine is better for a prompt than another. A dead engine should be noticed within
# seconds. During a push a paused engine answers /health but no requests, which must not open its circuit breaker.
DEFAULTS = {
    "policy": "round_robin",
    "log_level": "warn",
    "health_check_interval_secs": 2,
    "health_failure_threshold": 2,
    "health_success_threshold": 1,
    "disable_circuit_breaker": True,
    "shutdown_grace_period_secs": 1,
    "request_timeout_secs": 7200,
}


class Router:
    """A router process of our own, ready for engines to join."""

    def __init__(
        self,
        router_args: dict[str, Any],
        token: str,
        host: str = "127.0.0.1",
        wanted_port: int = 0,
        program: str = "sglang-router",
    ) -> None:
        """Start it on free ports of `host` and wait until it answers.

        Args:
            router_args: keyword arguments of sglang-router's `RouterArgs`; they win over `DEFAULTS`.
            token: the key that every request must carry.
            host: address to listen on.
            wanted_port: where to listen if it is free.
            program: `sglang-router` or `smg`.
        """
        with ExitStack() as ports:
            port = ports.enter_context(reserve_port(host, wanted_port)).getsockname()[1]
            metrics_port = ports.enter_context(reserve_port("127.0.0.1")).getsockname()[1]
            all_args = {
                **DEFAULTS, **router_args, "host": in_brackets(host), "port": port, "api_key": token,
                # Its counters can neither be switched off nor ask for a key: they stay on this machine.
                "prometheus_host": "127.0.0.1", "prometheus_port": metrics_port,
            }  # fmt: skip
            settings = {"program": program, "router_args": all_args}
            self._process = ServerProcess("rltrain.sglang.router_server", settings, make_url(host, port))
            try:
                self._process.wait_until_ready(timeout=READY_TIMEOUT)
            except BaseException:
                self._process.stop()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.stop()

    @property
    def url(self) -> str:
        """Where it listens."""
        return self._process.url

    def wait(self) -> None:
        """Wait for it to end; raises `ServerDiedError` when it has."""
        self._process.wait()


def main(context: RoleContext) -> None:
    """Start the router, announce it, and watch it."""
    config = arguments.load(context.run_dir)
    check_installed(config.engines.rollout_router)
    registry = Registry(context)
    port = _last_port(registry, context)
    with Router(
        router_args(config.engines, config.debug, context.index),
        context.token,
        context.host,
        port,
        config.engines.rollout_router,
    ) as router:
        registry.register(router.url)
        router.wait()


def router_args(engines: Engines, debug: Debug, model: int) -> dict[str, Any]:
    """`RouterArgs` of the router of a model, as the `--router-*` flags and `--sglang-config` say."""
    apart = {"pd_disaggregation": True} if is_disaggregated(engines, debug, model) else {}
    return {**apart, **engines.router}


def check_installed(program: str) -> None:
    """Check that the wanted router is installed.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(PACKAGES[program]) is None:
        raise UserError(
            f"--rollout-router {program}: the package is not installed here. Install it (pip install {program}), or"
            " leave the flag out."
        )


def _last_port(registry: Registry, context: RoleContext) -> int:
    """Port of the router before this one, so that whoever still asks there need not be told anything."""
    before = [each for each in registry.find(context.role) if each.index == context.index]
    return urlsplit(before[0].url).port or 0 if before else 0


if __name__ == "__main__":
    run_server_role(main)
