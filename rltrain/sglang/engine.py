"""The engine role: `python -m rltrain.sglang.engine` runs one SGLang server and joins it to the router."""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

from hpc.layout import RunLayout
from rltrain import arguments
from rltrain.runtime import Registry, RoleAddress, RoleContext
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.sglang.health import HealthLimits, HungError
from rltrain.sglang.http import HttpError
from rltrain.sglang.process import ServerDiedError
from rltrain.sglang.role import run_server_role


def engine_server_args(args: argparse.Namespace, index: int) -> dict[str, Any]:
    """`ServerArgs` of engine number `index`: what the job decides, then what `--sglang-*` flags say."""
    decided = {
        "model_path": args.hf_checkpoint,
        "tp_size": args.rollout_num_gpus_per_engine,
        # Engines with one seed would all draw the same tokens for the same prompt.
        "random_seed": args.seed + index,
    }
    if args.random_init:
        decided["load_format"] = "dummy"  # there are no weights yet: the trainer sends them
    return {**decided, **args.sglang}


def main(context: RoleContext) -> None:
    """Start the engine, join the router, announce it, and watch it."""
    args = arguments.load(context.run_dir)
    registry = Registry(context)
    server_args = engine_server_args(args, context.index)
    with HttpServerEngineAdapter.launch(server_args, context.token, host=context.host) as engine:
        membership = Membership(engine, registry)
        membership.join()
        registry.register(engine.url)
        try:
            engine.watch(health_limits(args), lambda: is_loading(context.layout), membership.follow_router)
        except (HungError, ServerDiedError):
            membership.leave()
            raise


class Membership:
    """An engine's place at the router, kept when the router is another one than before."""

    def __init__(self, engine: HttpServerEngineAdapter, registry: Registry) -> None:
        self._engine, self._registry = engine, registry
        self._router: RoleAddress | None = None

    def join(self) -> None:
        """Join the router as soon as there is one."""
        self._router = self._registry.wait_for("router")[0]
        self._engine.register(self._router.url)

    def follow_router(self) -> None:
        """Join the router that has taken the place of the one we joined, if there is such a one."""
        try:
            routers = self._registry.find("router")
            if routers and routers[0] != self._router:
                self._engine.register(routers[0].url)
                self._router = routers[0]
                print(f"joined the new router {self._router.url}", flush=True)
        except (OSError, HttpError, TimeoutError) as error:  # it is not up yet, or has gone again
            print(f"the router can't be joined yet: {error}", flush=True)

    def leave(self) -> None:
        """Leave the router, if it still answers: it must not send requests to an engine that is gone."""
        assert self._router is not None
        if self._router is None:
            return
        with contextlib.suppress(OSError, HttpError, TimeoutError):
            self._engine.unregister(self._router.url, timeout=5.0)


def health_limits(args: argparse.Namespace) -> HealthLimits:
    """The limits that the flags name."""
    return HealthLimits(
        args.rollout_health_check_interval,
        args.rollout_health_check_timeout,
        args.rollout_health_check_first_wait,
    )


def is_loading(layout: RunLayout) -> bool:
    """Whether the engines are being given weights now."""
    try:
        return json.loads(layout.status.read_text())["phase"] == "weights"
    except (OSError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    run_server_role(main)
