"""Engines and routers: their GPUs, which of them the job starts, and how their health is watched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from rltrain.arguments.declare import flag, worked_out
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Engines:
    """Engines and routers."""

    rollout_num_gpus: int = flag(
        "GPUs (CPU: processes) for all engines together (default: one engine); 0: none, only the router",
        metavar="N",
    )
    rollout_num_gpus_per_engine: int = flag("tensor parallel size of an engine (default: 1)", 1, metavar="N")
    colocate: bool = flag("engines and trainer share the same GPUs", False)
    offload_train: bool = flag(
        "the trainer frees its GPU memory while the engines work (default: with --colocate)"
    )
    offload_rollout: bool = flag(
        "the engines free their GPU memory while the trainer works (default: with --colocate)"
    )
    offload: bool = flag("--offload-train and --offload-rollout", False)
    sglang_server_concurrency: int = flag("requests in flight per engine", 512, metavar="N")
    sglang_config: str | None = flag(
        "file of models, each with a router and groups of engines; docs/engines.md", metavar="FILE"
    )
    rollout_external_engine_addrs: list[str] | None = flag(
        "engines that the job uses and sends weights to, but does not start", metavar="HOST:PORT"
    )
    rollout_external_engines_file: str | None = flag(
        "file of such engines, one per line; read again when it changes", metavar="FILE", owner="slurmlime"
    )
    sglang_router_ip: str | None = flag("host of a router that the job does not start", metavar="HOST")
    sglang_router_port: int | None = flag("port of that router", metavar="PORT")
    rollout_router: Literal["sglang-router", "smg"] = flag(
        "the router to start: sglang-router, or its successor if that is installed",
        "sglang-router",
        owner="slurmlime",
    )
    rollout_health_check_interval: float = flag(
        "seconds between checks of an engine's progress (default: 30)", 30.0, metavar="S"
    )
    rollout_health_check_timeout: float = flag(
        "seconds without progress before an engine is ended; ten times as many while it loads weights (default: 30)",
        30.0,
        metavar="S",
    )
    rollout_health_check_first_wait: float = flag(
        "seconds from an engine's start to the first check, so that it can compile (default: 0)",
        0.0,
        metavar="S",
    )
    sglang: dict[str, Any] = worked_out({})  # `--sglang-*`, handed to every engine
    router: dict[str, Any] = worked_out({})  # `--router-*`, handed to the router
    sglang_models: list[dict[str, Any]] = worked_out([])  # the content of the file of --sglang-config
    sglang_model_routers: dict[str, Any] | None = worked_out()  # by model; known in the rollout process

    @property
    def are_external(self) -> bool:
        """Whether the flags name engines, or a file of engines, that the job does not start."""
        return bool(self.rollout_external_engine_addrs or self.rollout_external_engines_file)


def resolve_offload(engines: Engines) -> Engines:
    """With `--colocate` both sides give up their memory in turn, unless the flags say otherwise."""
    both = engines.offload or engines.colocate
    return replace(
        engines,
        offload_train=both if engines.offload or engines.offload_train is None else engines.offload_train,
        offload_rollout=both
        if engines.offload or engines.offload_rollout is None
        else engines.offload_rollout,
    )


def resolve_count(engines: Engines, trainer_gpus: int) -> Engines:
    """Number of GPUs of all engines, without `--sglang-config`.

    Args:
        engines: as the flags say.
        trainer_gpus: GPUs of the trainer, which with `--colocate` are the engines' too.

    Raises:
        UserError: the GPUs can't be divided among the engines.
    """
    size, external = engines.rollout_num_gpus_per_engine, engines.are_external
    count = engines.rollout_num_gpus
    if count is None:
        count = 0 if external else max(trainer_gpus // size, 1) * size if engines.colocate else size
    if size < 1 or count < 0 or count % size:
        raise UserError(
            f"--rollout-num-gpus {count} is not a multiple of --rollout-num-gpus-per-engine {size}."
        )
    return replace(engines, rollout_num_gpus=count)


def check_health(engines: Engines) -> None:
    """Refuse intervals that are too short for a probe.

    Raises:
        UserError: names the flag and its value.
    """
    for name, least in (("interval", 0.1), ("timeout", 0.1), ("first_wait", 0.0)):
        value = getattr(engines, f"rollout_health_check_{name}")
        if not least <= value < float("inf"):
            flag = f"--rollout-health-check-{name.replace('_', '-')}"
            raise UserError(f"{flag} {value:g}: a number of seconds, at least {least:g}, is needed.")
