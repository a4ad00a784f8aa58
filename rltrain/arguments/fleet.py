"""The models that a run serves, each behind its own router, and their engines. Pure, but for reading the file.

Without `--sglang-config` it is one model, the one that is trained, with engines that are all alike. The format of the
file is slime's:

    sglang:
      - name: actor                  # and so on; the first that is trained is what samples come from
        server_groups:
          - {worker_type: regular, num_gpus: 4, num_gpus_per_engine: 2, overrides: {mem_fraction_static: 0.8}}
      - name: judge
        model_path: models/judge     # default: --hf-checkpoint
        update_weights: false        # default: whether the model is --hf-checkpoint
        server_groups: [{worker_type: regular, num_gpus: 2}]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.arguments.engine_names import RESERVED
from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.weights import Weights
from rltrain.arguments.recipes import read_config_file
from rltrain.run.errors import UserError, nearest

WORKER_TYPES = ("regular", "prefill", "decode", "placeholder")
_DEFAULT_MODEL = "default"
_MODEL_KEYS = (
    "name",
    "model_path",
    "update_weights",
    "num_gpus_per_engine",
    "server_groups",
    "engine_groups",
)
_GROUP_KEYS = ("worker_type", "num_gpus", "num_gpus_per_engine", "overrides")


@dataclass(frozen=True)
class EngineSpec:
    """One engine.

    Attributes:
        model: position of its model, which is also the index of its router.
        worker_type: `regular`, or `prefill` or `decode` where the two are apart.
        num_gpus: its tensor parallel size.
        first_gpu: its first GPU, counted over the GPUs of all engines.
        overrides: arguments of SGLang's `ServerArgs` for this one.
    """

    model: int
    worker_type: str
    num_gpus: int
    first_gpu: int
    overrides: dict[str, Any]


def models(engines: Engines, hf_checkpoint: str) -> list[dict[str, Any]]:
    """Every model: `name`, `model_path`, `update_weights` and `groups`, with all defaults filled in."""
    return [{"model_path": hf_checkpoint, **each} for each in _served(engines)]


def count_models(engines: Engines) -> int:
    """How many models the engines serve; each has a router."""
    return len(_served(engines))


def engine_specs(engines: Engines, debug: Debug) -> list[EngineSpec]:
    """The engines that the job starts, by index."""
    if debug.debug_train_only:
        return []
    specs, first_gpu = [], 0
    for position, model in enumerate(_served(engines)):
        for group in model["groups"]:
            size = group["num_gpus_per_engine"]
            for start in range(first_gpu, first_gpu + group["num_gpus"], size):
                if group["worker_type"] != "placeholder":
                    specs.append(EngineSpec(position, group["worker_type"], size, start, group["overrides"]))
            first_gpu += group["num_gpus"]
    return specs


def trained_model(engines: Engines) -> int:
    """Position of the model that samples come from: the first one with the trainer's weights."""
    return next(i for i, model in enumerate(_served(engines)) if model["update_weights"])


def trained_engines(engines: Engines, debug: Debug) -> list[int]:
    """Indices of the engines that get the trainer's weights."""
    served = _served(engines)
    return [i for i, spec in enumerate(engine_specs(engines, debug)) if served[spec.model]["update_weights"]]


def engines_load_alone(weights: Weights) -> bool:
    """True if the current weights are on disk, so that a restarted engine can load them by itself."""
    return weights.update_weight_transport == "disk" and weights.update_weight_mode == "full"


def is_disaggregated(engines: Engines, debug: Debug, model: int) -> bool:
    """True if different engines compute the prompts and the responses of a model."""
    return any(spec.worker_type == "prefill" for spec in engine_specs(engines, debug) if spec.model == model)


def _served(engines: Engines) -> list[dict[str, Any]]:
    """The models; the only one of a run without `--sglang-config` has no `model_path` yet."""
    if engines.sglang_models:
        return engines.sglang_models
    group = {
        "worker_type": "regular",
        "num_gpus": engines.rollout_num_gpus,
        "num_gpus_per_engine": engines.rollout_num_gpus_per_engine,
        "overrides": {},
    }
    groups = [group] if engines.rollout_num_gpus else []
    return [{"name": _DEFAULT_MODEL, "update_weights": True, "groups": groups}]


def read_models(path: str, hf_checkpoint: str, engine_size: int) -> list[dict[str, Any]]:
    """The models that the file of `--sglang-config` describes, see `models`.

    Raises:
        UserError: names the file, the model and the entry that is wrong.
    """
    entries = read_config_file(path, "--sglang-config").get("sglang")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--sglang-config {path}: it needs a list of models under `sglang:`.")
    served = [
        _model(f"--sglang-config {path}, model {i + 1}", each, hf_checkpoint, engine_size)
        for i, each in enumerate(entries)
    ]
    names = [model["name"] for model in served]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--sglang-config {path}: two models have the name {name!r}.")
    if not any(model["update_weights"] and model["groups"] for model in served):
        raise UserError(
            f"--sglang-config {path}: none of the models {', '.join(names)} is trained, so no samples can come from"
            " them. Leave model_path out of one, or say `update_weights: true`."
        )
    return served


def _model(where: str, entry: Any, hf_checkpoint: str, engine_size: int) -> dict[str, Any]:
    _check_keys(where, entry, _MODEL_KEYS)
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: it needs a name.")
    where = f"{where} ({name})"
    groups = entry.get("server_groups", entry.get("engine_groups"))
    if not isinstance(groups, list) or not groups:
        raise UserError(f"{where}: it needs a list of engines under `server_groups:`.")
    default_size = entry.get("num_gpus_per_engine") or engine_size
    path = str(Path(entry.get("model_path") or hf_checkpoint).expanduser().absolute())
    is_actor = path == str(Path(hf_checkpoint).expanduser().absolute())
    model = {
        "name": name,
        "model_path": path,
        "update_weights": entry.get("update_weights", is_actor),
        "groups": [_group(f"{where}, group {i + 1}", each, default_size) for i, each in enumerate(groups)],
    }
    kinds = {group["worker_type"] for group in model["groups"]}
    if ("prefill" in kinds) != ("decode" in kinds) or {"prefill", "regular"} <= kinds:
        raise UserError(
            f"{where}: it has groups of the types {', '.join(sorted(kinds))}. Either all are regular, or there are"
            " prefill and decode ones."
        )
    if kinds == {"placeholder"}:
        raise UserError(f"{where}: placeholders start no engine, so nothing serves this model.")
    return model


def _group(where: str, entry: Any, default_size: int) -> dict[str, Any]:
    _check_keys(where, entry, _GROUP_KEYS)
    kind, gpus = entry.get("worker_type"), entry.get("num_gpus")
    if kind not in WORKER_TYPES:
        raise UserError(f"{where}: worker_type {kind!r}; it is one of {', '.join(WORKER_TYPES)}.")
    size = entry.get("num_gpus_per_engine") or (gpus if kind == "placeholder" else default_size)
    for number in (gpus, size):
        if not isinstance(number, int) or number < 1:
            raise UserError(
                f"{where}: num_gpus and num_gpus_per_engine are whole numbers of at least 1, not {number!r}."
            )
    if gpus % size:
        raise UserError(f"{where}: num_gpus {gpus} is not a multiple of num_gpus_per_engine {size}.")
    overrides = entry.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise UserError(f"{where}: overrides is a table of SGLang's arguments, not {overrides!r}.")
    overrides = {str(name).replace("-", "_"): value for name, value in overrides.items() if value is not None}
    if taken := [name for name in overrides if name.replace("_", "-") in RESERVED["sglang"]]:
        raise UserError(f"{where}: overrides has {taken[0]}, which the job itself sets.")
    return {"worker_type": kind, "num_gpus": gpus, "num_gpus_per_engine": size, "overrides": overrides}


def _check_keys(where: str, entry: Any, known: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: this must be a table, not {entry!r}.")
    for key in entry:
        if key not in known:
            near = nearest(str(key), known)
            raise UserError(f"{where}: unknown entry {key!r}" + (f"; did you mean {near}?" if near else "."))
