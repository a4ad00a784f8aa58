"""The routers of a job, one for each model that it serves: found in the registry, or named by the flags."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from urllib.parse import urlsplit

from rltrain.arguments.external import external_token
from rltrain.arguments.fleet import models, trained_model
from rltrain.runtime import Registry

_ROLE = "router"


@dataclass(frozen=True)
class RouterAddress:
    """A router and the token that it asks for; `pid` is another one when it has been started again, 0 if unknown."""

    url: str
    token: str
    pid: int = 0

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The parts of the URL, as slime's `args.sglang_router_ip` and `_port` have them."""
        parts = urlsplit(self.url)
        assert parts.hostname and parts.port
        return parts.hostname, parts.port


def external_router(args: argparse.Namespace) -> RouterAddress | None:
    """The router that the flags name, or None."""
    if args.sglang_router_ip is None:
        return None
    return RouterAddress(f"http://{args.sglang_router_ip}:{args.sglang_router_port}", external_token())


def find_router(args: argparse.Namespace, registry: Registry, token: str, model: int) -> RouterAddress | None:
    """The router of a model as it is now, None while there is none."""
    if router := external_router(args):
        return router
    return next(
        (RouterAddress(each.url, token, each.pid) for each in registry.find(_ROLE) if each.index == model),
        None,
    )


def wait_for_router(args: argparse.Namespace, registry: Registry, token: str, model: int) -> RouterAddress:
    """The same, as soon as there is one.

    Raises:
        TimeoutError: there was none for too long.
    """
    if external_router(args) is None:
        registry.wait_for(_ROLE, len(models(args)))
    router = find_router(args, registry, token, model)
    assert router is not None
    return router


def set_routers(args: argparse.Namespace, routers: list[RouterAddress]) -> None:
    """Put the routers, one a model, where rollout and reward functions look: slime's names.

    `args.sglang_model_routers` has all by the model's name, `args.sglang_router_ip` and `_port` are those of the model
    that samples come from.
    """
    names = [model["name"] for model in models(args)]
    args.sglang_model_routers = {
        name: router.host_and_port for name, router in zip(names, routers, strict=True)
    }
    args.sglang_router_ip, args.sglang_router_port = routers[trained_model(args)].host_and_port


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
