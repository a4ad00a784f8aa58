"""The engine role: `python -m rltrain.sglang.engine` runs one SGLang server and joins it to the router.

An engine that spans nodes is one such process a node. The first serves; the others only compute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hpc.layout import RunLayout
from rltrain import arguments
from rltrain.processes import reserve_port
from rltrain.runtime import Registry, RoleAddress, RoleContext
from rltrain.sglang import workers
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.sglang.health import HealthLimits, HungError
from rltrain.sglang.http import HttpError
from rltrain.sglang.process import ServerDiedError
from rltrain.sglang.role import run_server_role
from rltrain.weights.current import current_weights, load_weights, weight_version


def engine_server_args(args: argparse.Namespace, index: int, weights: Path | None = None) -> dict[str, Any]:
    """`ServerArgs` of engine number `index`: what the job decides, then what `--sglang-*` flags say.

    `weights` is a directory of the trainer's, in place of the model that the run began with.
    """
    decided = {
        "model_path": args.hf_checkpoint,
        "tp_size": args.rollout_num_gpus_per_engine,
        # Engines with one seed would all draw the same tokens for the same prompt.
        "random_seed": args.seed + index,
    }
    if weights is not None:
        decided |= {"model_path": str(weights), "weight_version": str(weight_version(weights))}
    elif args.random_init:
        decided["load_format"] = "dummy"  # there are no weights yet: the trainer sends them
    return {**decided, **args.sglang}


def main(context: RoleContext) -> None:
    """Start the engine, join the router, announce it, and watch it."""
    args = arguments.load(context.run_dir)
    registry = Registry(context)
    # The weights of an earlier attempt are none of ours: the trainer sends what it has resumed from.
    weights = current_weights(context.layout.weights) if context.restarts else None
    server_args = engine_server_args(args, context.index, weights)
    with ExitStack() as held:
        if context.nnodes > 1:
            server_args |= _meet(context, registry, held)
        if context.replaces:
            workers.remove_worker(registry.wait_for("router")[0].url, context.token, context.replaces)
        engine = held.enter_context(
            HttpServerEngineAdapter.launch(server_args, context.token, host=context.host)
        )
        if context.node_rank:
            engine.wait()
        membership = Membership(engine, registry)
        _join(membership, engine, context, registry, weights)
        try:
            engine.watch(health_limits(args), lambda: is_loading(context.layout), membership.follow_router)
        except (HungError, ServerDiedError):
            membership.leave()
            raise


def _meet(context: RoleContext, registry: Registry, held: ExitStack) -> dict[str, Any]:
    """Arguments by which the processes of an engine that spans nodes find each other: the first chooses a port."""
    name = f"{context.role}-{context.index}"
    if context.node_rank == 0:
        port = held.enter_context(reserve_port(context.host)).getsockname()[1]
        registry.offer(name, f"{context.host}:{port}")
    return {
        "nnodes": context.nnodes,
        "node_rank": context.node_rank,
        "dist_init_addr": registry.await_offer(name),
    }


def _join(
    membership: Membership,
    engine: HttpServerEngineAdapter,
    context: RoleContext,
    registry: Registry,
    weights: Path | None,
) -> None:
    """Be found by requests and by the trainer; an engine that was started again, only with the current weights.

    The trainer looks for engines when it has written new weights, and sends them to those that it finds. One that comes
    too late to be found sees them there, and has them before its first request.
    """
    if not context.restarts:
        membership.join()
    registry.register(engine.url)
    if context.restarts:
        newest = current_weights(context.layout.weights)
        if newest is not None and newest != weights:
            load_weights(engine, newest)
        membership.join()


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
