"""The engine role: `python -m rltrain.sglang.engine` runs one SGLang server and joins it to the router.

An engine that spans nodes is one such process a node. The first serves; the others only compute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hpc.layout import RunLayout
from rltrain import arguments
from rltrain.arguments.fleet import engine_specs, engines_load_alone, models
from rltrain.processes import reserve_port
from rltrain.runtime import Registry, RoleContext
from rltrain.sglang import workers
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.sglang.engines import ExpelledError
from rltrain.sglang.health import HealthLimits, HungError
from rltrain.sglang.membership import Membership, Place
from rltrain.sglang.process import ServerDiedError
from rltrain.sglang.role import run_server_role
from rltrain.sglang.routers import wait_for_router
from rltrain.weights.current import current_weights, load_weights, weight_version


def engine_server_args(args: argparse.Namespace, index: int, weights: Path | None = None) -> dict[str, Any]:
    """`ServerArgs` of engine number `index`: what the job decides, then what `--sglang-*` and `--sglang-config` say.

    `weights` is a directory of the trainer's, in place of the model that the run began with.
    """
    spec = engine_specs(args)[index]
    model = models(args)[spec.model]
    decided = {
        "model_path": model["model_path"],
        "tp_size": spec.num_gpus,
        # Engines with one seed would all draw the same tokens for the same prompt.
        "random_seed": args.seed + index,
    }
    if spec.worker_type != "regular":
        decided["disaggregation_mode"] = spec.worker_type
    if weights is not None:
        decided |= {"model_path": str(weights), "weight_version": str(weight_version(weights))}
    elif args.random_init and model["update_weights"]:
        decided["load_format"] = "dummy"  # there are no weights yet: the trainer sends them
    if args.debug_rollout_only:
        decided["weight_version"] = "0"  # as weights are called that no rollout has trained
    if args.offload_rollout and model["update_weights"]:
        decided["enable_memory_saver"] = True
        # Released weights are lost, and not sent again after every step.
        decided["enable_weights_cpu_backup"] = args.update_weights_interval > 1
    return {**decided, **args.sglang, **spec.overrides}


def main(context: RoleContext) -> None:
    """Start the engine, join the router, announce it, and watch it."""
    args = arguments.load(context.run_dir)
    registry = Registry(context)
    weights = _newest_weights(args, context) if context.restarts else None
    server_args = engine_server_args(args, context.index, weights)
    with ExitStack() as held:
        if context.nnodes > 1:
            server_args |= _meet(context, registry, held)
        place = Place.of(args, context, held)
        if context.replaces:
            router = wait_for_router(args, registry, context.token, place.model)
            workers.remove_worker(router.url, router.token, context.replaces)
        engine = held.enter_context(
            HttpServerEngineAdapter.launch(server_args | place.server_args, context.token, host=context.host)
        )
        if context.node_rank:
            engine.wait()
        membership = Membership(engine, args, registry, place)
        if context.restarts and _is_trained(args, context) and not engines_load_alone(args):
            membership.join_after(engine.get_weight_version())
            registry.register(engine.url)
        elif context.restarts:
            _join_again(membership, engine, registry, weights, lambda: _newest_weights(args, context))
        else:
            membership.join()
            registry.register(engine.url)
        try:
            engine.watch(health_limits(args), lambda: is_loading(context.layout), membership.look)
        except (HungError, ServerDiedError, ExpelledError):
            membership.leave()
            raise


def _newest_weights(args: argparse.Namespace, context: RoleContext) -> Path | None:
    """What the trainer has written last in this attempt; None for a model that it does not train.

    Only for an engine that is started again. The weights of an earlier attempt are none of ours: the trainer sends what
    it has resumed from.
    """
    is_there = _is_trained(args, context) and engines_load_alone(args)
    return current_weights(context.layout.weights) if is_there else None


def _is_trained(args: argparse.Namespace, context: RoleContext) -> bool:
    return models(args)[engine_specs(args)[context.index].model]["update_weights"]


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


def _join_again(
    membership: Membership,
    engine: HttpServerEngineAdapter,
    registry: Registry,
    weights: Path | None,
    newest_weights: Callable[[], Path | None],
) -> None:
    """Be found by requests only with the current weights; `weights` are those that the engine has.

    The trainer looks for engines when it has written new weights, and sends them to those that it finds. One that comes
    too late to be found sees them there, and has them before its first request.
    """
    registry.register(engine.url)
    newest = newest_weights()
    if newest is not None and newest != weights:
        load_weights(engine, newest)
    membership.join()


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
