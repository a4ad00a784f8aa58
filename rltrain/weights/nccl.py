"""NCCL's environment: what trainer and engines must have in common, so that weights can go from one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rltrain.arguments.fleet import engine_specs, trained_engines
from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.parallel import Parallel
from rltrain.arguments.groups.weights import Weights

_NO = ("false", "0", "no", "n")  # as SGLang reads a variable


def nccl_settings(
    engines: Engines, weights: Weights, parallel: Parallel, debug: Debug, env: Mapping[str, str]
) -> dict[str, str]:
    """Variables for the trainer and for the engines that it may send weights to over NCCL; else none.

    NCCL has two ways to share a GPU's memory, cuMem and CUDA's older IPC, and can't connect a process of the one to one
    of the other on a machine. Left alone, NCCL takes cuMem, and each engine what its own flags and machine suggest
    (SGLang's `_set_envs_and_config` and `_handle_a2a_moe`). Here `env` decides for all, else an engine that needs
    cuMem. SGLang keeps what is set, but for symmetric memory, which sets 1.

    The groups are resolved; whether --update-weight-transport `auto` will be NCCL is not known yet, so it counts as
    that. `env` is this role's; what `[slurm.env]` has is in that of all.
    """
    name, is_gloo = "NCCL_CUMEM_ENABLE", engines.colocate or parallel.distributed_backend == "gloo"
    if is_gloo or weights.update_weight_transport in ("disk", "tensor"):
        return {}
    if debug.debug_train_only or debug.debug_rollout_only:
        return {}
    specs = engine_specs(engines, debug)
    flags = [{**engines.sglang, **specs[i].overrides} for i in trained_engines(engines, debug)]
    if any(each.get("enable_symm_mem") for each in flags):
        return {name: "1"}
    if name in env:
        return {name: env[name]}
    return {name: str(int(any(_needs_cumem(engines, each, env) for each in flags)))}


def _needs_cumem(engines: Engines, flags: Mapping[str, Any], env: Mapping[str, str]) -> bool:
    """Whether SGLang takes cuMem for an engine with these flags: for DeepEP v2, or the window of a sharded cache."""
    saves_memory = engines.offload_rollout or flags.get("enable_memory_saver")
    has_window = (
        env.get("SGLANG_ENABLE_KV_SHARD_ZERO_SM_GATHER", "1").lower() not in _NO
        and "SGLANG_MOONCAKE_CUSTOM_MEM_POOL" not in env
        and not saves_memory
    )
    return flags.get("moe_a2a_backend") == "deepep_v2" or bool(
        flags.get("enable_kv_cache_sharding") and has_window
    )
