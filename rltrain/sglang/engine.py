"""The engine role: `python -m rltrain.sglang.engine` runs one SGLang server and joins it to the router.

An engine that spans nodes is one such process per node. The first serves; the others only compute.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rltrain import arguments
from rltrain.arguments.config import Config
from rltrain.arguments.fleet import (
    engine_specs,
    engines_load_alone,
    models,
    trained_engines,
)
from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.run.errors import UserError
from rltrain.run.files import read_object
from rltrain.run.http import HttpError, host_and_port
from rltrain.run.processes import reserve_port
from rltrain.run.role import Registry, RoleContext
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.sglang.engines import expulsion
from rltrain.sglang.health import HungError, health_limits, is_loading
from rltrain.sglang.process import ExpelledError, ServerDiedError, run_server_role
from rltrain.sglang.routers import RouterAddress, find_router, remove_worker, wait_for_router
from rltrain.weights.nccl import nccl_settings
from rltrain.weights.transports.current import current_weights, load_from_disk, weight_version

_LEAVE_SECONDS = 5.0
# Of a model's hidden states: threads would wait for each other longer than they compute a smaller one.
_SIZE_FOR_THREADS = 256


def engine_server_args(config: Config, index: int, weights: Path | None = None) -> dict[str, Any]:
    """`ServerArgs` of engine number `index`: what the job decides, then what `--sglang-*` and `--sglang-config` say.

    `weights` is a directory that the trainer has written; it replaces the model that the run began with.
    """
    spec = engine_specs(config.engines, config.debug)[index]
    model = models(config.engines, config.model.hf_checkpoint)[spec.model]
    decided = {
        "model_path": model["model_path"],
        "tp_size": spec.num_gpus,
        # Engines with one seed would all draw the same tokens for the same prompt.
        "random_seed": config.optimizer.seed + index,
    }
    if spec.worker_type != "regular":
        decided["disaggregation_mode"] = spec.worker_type
    if weights is not None:
        decided |= {"model_path": str(weights), "weight_version": str(weight_version(weights))}
    elif config.model.random_init and model["update_weights"]:
        decided["load_format"] = "dummy"  # there are no weights yet: the trainer sends them
    if config.algorithm.use_rollout_routing_replay and model["update_weights"]:
        decided["enable_return_routed_experts"] = True
    if config.debug.debug_rollout_only:
        decided["weight_version"] = "0"  # the version of weights that no rollout has trained
    if config.engines.offload_rollout and model["update_weights"]:
        decided["enable_memory_saver"] = True
        # Released weights are lost, and not sent again after every step; indexers and a model that drafts never are.
        has_indexers = "index_topk" in _hf_config(decided)
        decided["enable_weights_cpu_backup"] = config.weights.update_weights_interval > 1 or has_indexers
        if "speculative_algorithm" in {**config.engines.sglang, **spec.overrides}:
            decided["enable_draft_weights_cpu_backup"] = True
    return {**decided, **config.engines.sglang, **spec.overrides}


def cpu_threads(config: Config, server_args: Mapping[str, Any]) -> int:
    """Threads of each rank of an engine, for a machine without a GPU.

    While engines generate, the trainer of an on-policy run waits: they share all cores that this process may use. It
    does not wait with --max-staleness.
    """
    hf_config = _hf_config(server_args)
    hidden = hf_config.get("hidden_size") or hf_config.get("text_config", {}).get("hidden_size") or 0
    if config.rollout.max_staleness or hidden < _SIZE_FOR_THREADS:
        return 1
    ranks = sum(spec.num_gpus for spec in engine_specs(config.engines, config.debug))
    return max(1, len(os.sched_getaffinity(0)) // max(1, ranks))


def _hf_config(server_args: Mapping[str, Any]) -> dict[str, Any]:
    """The model's `config.json`; empty where it is not on this machine."""
    file = Path(server_args["model_path"]) / "config.json"
    return read_object(file) if file.is_file() else {}


def refuse_soft_caps(server_args: Mapping[str, Any]) -> None:
    """Refuse settings that SGLang's attention for CPUs ignores silently: engine and trainer would be different models.

    Raises:
        UserError: the model has soft caps of attention's scores.
    """
    config = _hf_config(server_args)
    backend = server_args.get("attention_backend", "torch_native")
    if config.get("model_type") != "gemma2" or backend != "torch_native":
        return
    from rltrain.sglang import cpu  # it imports torch

    if config.get("attn_logit_softcapping", True) and not cpu.has_accelerator():
        raise UserError(
            f"{server_args['model_path']}/config.json has soft caps of attention's scores (attn_logit_softcapping),"
            " which SGLang computes on a GPU only, and there is none here. --debug-train-only trains without engines."
        )


def main(context: RoleContext) -> None:
    """Start the engine, join the router, announce it, and watch it."""
    config = arguments.load(context.run_dir)
    registry = Registry(context)
    weights = _newest_weights(config, context) if context.restarts else None
    server_args = engine_server_args(config, context.index, weights)
    refuse_soft_caps(server_args)
    server_args["cpu_threads"] = cpu_threads(config, server_args)
    is_trained = context.index in trained_engines(config.engines, config.debug)
    if is_trained:
        # The server has this role's variables.
        os.environ.update(
            nccl_settings(config.engines, config.weights, config.parallel, config.debug, os.environ)
        )
    with ExitStack() as held:
        if context.nnodes > 1:
            server_args |= _meet(context, registry, held)
        place = Place.of(config.engines, config.debug, context, held)
        if context.replaces:
            router = wait_for_router(config.engines, registry, context.token, place.model)
            remove_worker(router.url, router.token, context.replaces)
        engine = held.enter_context(
            HttpServerEngineAdapter.launch(server_args | place.server_args, context.token, host=context.host)
        )
        if context.node_rank:
            engine.wait()
        membership = Membership(engine, config.engines, registry, place)
        if context.restarts and is_trained and not engines_load_alone(config.weights):
            membership.join_after(engine.get_weight_version())
            registry.register(engine.url)
        elif context.restarts:
            _join_again(membership, engine, registry, weights, lambda: _newest_weights(config, context))
        else:
            membership.join()
            registry.register(engine.url)
        try:
            engine.watch(health_limits(config.engines), lambda: is_loading(context.layout), membership.look)
        except (HungError, ServerDiedError, ExpelledError):
            membership.leave()
            raise


def _newest_weights(config: Config, context: RoleContext) -> Path | None:
    """What the trainer has written last in this attempt; None for a model that it does not train.

    Only for an engine that is started again. Weights of an earlier attempt do not count: the trainer sends those that
    it has resumed from.
    """
    is_trained = context.index in trained_engines(config.engines, config.debug)
    is_there = is_trained and engines_load_alone(config.weights)
    return current_weights(context.layout.weights) if is_there else None


def _meet(context: RoleContext, registry: Registry, held: ExitStack) -> dict[str, Any]:
    """Arguments by which the processes of an engine that spans nodes find each other: the first chooses a port."""
    name = f"{context.role}-{context.index}"
    if context.node_rank == 0:
        port = held.enter_context(reserve_port(context.host)).getsockname()[1]
        registry.offer(name, host_and_port(context.host, port))
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
    """Join the router only with the current weights; `weights` are those that the engine has.

    When the trainer has written new weights, it looks for engines and sends them the weights. An engine that comes too
    late to be found loads them from there, before its first request.
    """
    registry.register(engine.url)
    newest = newest_weights()
    if newest is not None and newest != weights:
        load_from_disk(engine, newest)
    membership.join()


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
    def of(cls, engines: Engines, debug: Debug, context: RoleContext, held: ExitStack) -> Place:
        """The place of this engine role; a port that it needs is kept in `held`."""
        spec = engine_specs(engines, debug)[context.index]
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
    """The engine's place behind the router of its model, kept when that router dies and another takes its place."""

    def __init__(
        self, engine: HttpServerEngineAdapter, flags: Engines, registry: Registry, place: Place
    ) -> None:
        self._engine, self._flags, self._registry, self._place = engine, flags, registry, place
        self._router: RouterAddress | None = None
        self._outdated: str | None = None

    def join_after(self, version: str) -> None:
        """Join as soon as the engine has weights of another version than this, see `look`."""
        self._outdated = version

    def join(self) -> None:
        """Join the router as soon as there is one."""
        place = self._place
        self._join(wait_for_router(self._flags, self._registry, place.token, place.model))

    def look(self) -> None:
        """Join the router that has replaced the one that we joined, if there is one; call once a second.

        Raises:
            ExpelledError: the trainer says that the engine did not get its weights.
        """
        place, engine = self._place, self._engine
        try:
            if reason := self._registry.offered(expulsion(engine.url, os.getpid())):
                raise ExpelledError(f"expelled by the trainer: {reason}")
            if self._outdated is not None and engine.get_weight_version() == self._outdated:
                return
            self._outdated = None
            router = find_router(self._flags, self._registry, place.token, place.model)
            if router not in (None, self._router):
                self._join(router)
                print(f"joined the router {router.url}", flush=True)
        except (OSError, HttpError, TimeoutError) as error:  # it is not up yet, or is gone again
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


if __name__ == "__main__":
    run_server_role(main)
