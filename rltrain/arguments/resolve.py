"""Fill in what follows from other flags, and refuse what is wrong. Pure, but for the files of settings.

The rules of one group stand in that group's file. This file has their order, and the rules of several groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rltrain.arguments.config import Config
from rltrain.arguments.declare import check_ranges, declared
from rltrain.arguments.external import check_external
from rltrain.arguments.fleet import read_models
from rltrain.arguments.groups.agents import resolve_agents
from rltrain.arguments.groups.algorithm import resolve_algorithm
from rltrain.arguments.groups.checkpoint import check_checkpoint
from rltrain.arguments.groups.critic import check_critic, use_critic
from rltrain.arguments.groups.data import absolute, resolve_data
from rltrain.arguments.groups.debug import check_profiling, resolve_debug
from rltrain.arguments.groups.engines import Engines, check_health, resolve_count, resolve_offload
from rltrain.arguments.groups.evaluation import only_evaluates, resolve_defaults, resolve_sets
from rltrain.arguments.groups.functions import DEFAULT_ROLLOUT_FUNCTION, SFT_ROLLOUT_FUNCTION, Functions
from rltrain.arguments.groups.model import Model, check_recomputation
from rltrain.arguments.groups.parallel import ParallelSizes, check_parallel
from rltrain.arguments.groups.rollout import check_temperature, resolve_rollout
from rltrain.arguments.groups.training import (
    check_micro_batches,
    check_mtp_flags,
    check_schedule,
    resolve_lora,
    resolve_training,
    why_separate,
)
from rltrain.arguments.slime_names import EPOCHS, our_path
from rltrain.models.directory import cached_model
from rltrain.run.errors import UserError

_PATHS = (
    "hf_checkpoint", "load", "ref_load", "save", "save_hf", "wandb_dir", "critic_load", "critic_save",
    "opd_teacher_load", "rollout_external_engines_file", "tensorboard_dir", "memory_snapshot_dir",
)  # fmt: skip


def resolve(config: Config) -> Config:
    """The configuration with everything filled in.

    Raises:
        UserError: names the flags that contradict each other, with their values.
    """
    if name := config.model.hf_checkpoint:
        config = replace(config, model=replace(config.model, hf_checkpoint=cached_model(name)))
    debug, functions = resolve_debug(config.debug, _our_functions(config.functions))
    check_ranges([config.agents])
    agents, functions = resolve_agents(config.agents, functions)
    config = _resolve_fine_tuning(replace(config, debug=debug, functions=functions, agents=agents))
    _check_environment(config)
    _check_required(config)
    if config.rollout.num_epoch is not None and config.rollout.num_rollout is not None:
        config = replace(config, ignored_flags=sorted({*config.ignored_flags, EPOCHS}))
    check_ranges([getattr(config, name) for name in ("rollout", "training", "checkpoint", "evaluation")])
    check_ranges([config.parallel, config.weights, config.algorithm, config.profiling, config.lora])
    check_ranges([config.optimizer, config.critic, config.rewards])
    check_profiling(config.profiling, config.debug)
    config = replace(config, training=resolve_training(config.training, config.rollout))
    config = _resolve_parallel(config)
    check_schedule(config.optimizer)
    check_checkpoint(config.checkpoint)
    config = _resolve_engines(config)
    check_health(config.engines)
    config = replace(config, rollout=resolve_rollout(config.rollout), data=resolve_data(config.data))
    config = _resolve_evaluation(config)
    config = _resolve_staleness(config)
    config = _resolve_lora(_resolve_routing(_resolve_algorithm(config)))
    _check_mtp(config)
    _check_shared_prompts(config)
    return _absolute_paths(config)


def _our_functions(functions: Functions) -> Functions:
    """Functions that come with slime are taken from where they are here."""
    ours: dict[str, Any] = {}
    for each in declared(Functions):
        if each.flag.call is not None and (given := getattr(functions, each.name)):
            several = isinstance(given, list)
            paths = [our_path(path, each.option) for path in (given if several else [given])]
            ours[each.name] = paths if several else paths[0]
    return replace(functions, **ours)


def _our_functions_of_set(settings: dict[str, Any]) -> dict[str, Any]:
    paths = {name: path for name, path in settings.items() if name.endswith("_path")}
    return settings | {
        name: our_path(path, f"evaluation set {settings['name']!r}: {name}") for name, path in paths.items()
    }


def _resolve_fine_tuning(config: Config) -> Config:
    """Nothing is generated for the loss on given responses, unless a rollout function is named that does so."""
    functions = config.functions
    if (
        config.algorithm.loss_type != "sft_loss"
        or functions.rollout_function_path != DEFAULT_ROLLOUT_FUNCTION
    ):
        return config
    return replace(
        config,
        functions=replace(functions, rollout_function_path=SFT_ROLLOUT_FUNCTION),
        debug=replace(config.debug, debug_train_only=True),
    )


def _check_environment(config: Config) -> None:
    if config.agents.environment is None:
        return
    if config.rewards.rm_type:
        raise UserError("--environment has its own reward: leave --rm-type out.")
    if config.data.prompt_data is None:
        raise UserError("--environment needs --prompt-data FILE, the file that its tasks are written to.")
    evaluation = config.evaluation
    if config.agents.eval_environment_args is not None and not (
        evaluation.eval_prompt_data or evaluation.eval_config
    ):
        raise UserError(
            "--eval-environment-args needs --eval-prompt-data NAME FILE, the file that these tasks are written to."
        )


def _check_required(config: Config) -> None:
    rollout, data = config.rollout, config.data
    wanted: dict[str, tuple[Any, str]] = {
        "--hf-checkpoint": (config.model.hf_checkpoint, "the model's Hugging Face directory"),
        "--prompt-data": (
            data.prompt_data
            or data.prompt_data_mix
            or config.debug.load_debug_rollout_data
            or (None if data.rollout_global_dataset else "none"),
            "a JSONL, Parquet or CSV file of prompts",
        ),
        "--rollout-batch-size": (rollout.rollout_batch_size, "prompts in a rollout"),
        "--num-rollout": (
            rollout.num_epoch if rollout.num_rollout is None else rollout.num_rollout,
            "rollouts in the run (or --num-epoch)",
        ),
    }
    if missing := [f"{flag} ({what})" for flag, (value, what) in wanted.items() if value is None]:
        raise UserError("missing " + ", ".join(missing) + ".")
    _check_without_prompts(config)
    if config.debug.debug_rollout_only and config.model.random_init:
        raise UserError(
            "--debug-rollout-only: engines generate with the weights of --hf-checkpoint, and --random-init has none."
        )


def _check_without_prompts(config: Config) -> None:
    if config.data.rollout_global_dataset:
        return
    functions, flag = config.functions, "--disable-rollout-global-dataset"
    if functions.rollout_function_path in (DEFAULT_ROLLOUT_FUNCTION, SFT_ROLLOUT_FUNCTION) and not (
        functions.custom_generate_function_path
    ):
        raise UserError(
            f"{flag}: without prompts samples begin empty. Fill them with --custom-generate-function-path or"
            " --rollout-function-path."
        )
    if config.rollout.num_rollout is None:
        raise UserError(f"{flag}: a run without prompts has no epochs. Give --num-rollout, not --num-epoch.")


def _resolve_parallel(config: Config) -> Config:
    parallel = config.parallel
    check_parallel(parallel)
    check_micro_batches(config.training, ParallelSizes.of(parallel).data)
    check_recomputation(config.model)
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        return replace(config, parallel=replace(parallel, sequence_parallel=False))
    return config


def _resolve_engines(config: Config) -> Config:
    engines, weights = resolve_offload(config.engines), config.weights
    if weights.update_weight_transport == "nccl":  # slime's word
        weights = replace(weights, update_weight_transport="distributed")
    if weights.update_weight_transport == "auto" and engines.are_external:
        weights = replace(weights, update_weight_transport="disk")
    if weights.update_weight_mode == "delta" and weights.update_weight_transport == "tensor":
        raise UserError(
            "--update-weight-mode delta saves nothing with --update-weight-transport tensor, which works on one"
            " machine only: leave one of them out."
        )
    if weights.update_weight_transport == "tensor" and config.parallel.actor_num_nodes > 1:
        raise UserError(
            "--update-weight-transport tensor works on one machine only, and --actor-num-nodes is"
            f" {config.parallel.actor_num_nodes}: use distributed, or disk with --colocate."
        )
    check_external(engines, weights)
    if engines.sglang_config:
        engines = _read_fleet(config.model, engines)
    else:
        engines = resolve_count(engines, config.parallel.num_ranks)
    _check_one_server(engines)
    return replace(config, engines=engines, weights=weights)


def _check_one_server(engines: Engines) -> None:
    groups = [group for model in engines.sglang_models or () for group in model["groups"]]
    for settings in (engines.sglang, *(group["overrides"] for group in groups)):
        if settings.get("tokenizer_worker_num", 1) > 1:
            raise UserError(
                f"--sglang-tokenizer-worker-num {settings['tokenizer_worker_num']}: SGLang serves from several"
                " processes only without an API key, and a job's engines have one. Leave it out, or have more engines."
            )


def _read_fleet(model_config: Model, engines: Engines) -> Engines:
    path = absolute(engines.sglang_config or "")
    models = read_models(path, model_config.hf_checkpoint, engines.rollout_num_gpus_per_engine)
    total = sum(group["num_gpus"] for model in models for group in model["groups"])
    if engines.rollout_num_gpus not in (None, total):
        raise UserError(
            f"--rollout-num-gpus {engines.rollout_num_gpus}, but the groups of --sglang-config have {total} GPUs"
            " together."
        )
    return replace(engines, sglang_config=path, sglang_models=models, rollout_num_gpus=total)


def _resolve_evaluation(config: Config) -> Config:
    evaluation = resolve_defaults(config.evaluation, config.data, config.rollout, config.rewards)
    evaluation = resolve_sets(evaluation, config.values())
    if config.rollout.num_rollout == 0:
        evaluation = only_evaluates(evaluation)
    sets = [_our_functions_of_set(each) for each in evaluation.eval_datasets]
    evaluation = replace(evaluation, eval_datasets=sets)
    if (
        evaluation.eval_datasets
        and config.debug.debug_train_only
        and config.algorithm.loss_type != "sft_loss"
    ):
        raise UserError(
            "--eval-prompt-data needs engines, and --debug-train-only starts none. Only --loss-type sft_loss is"
            " evaluated without engines: by its loss."
        )
    return replace(config, evaluation=evaluation)


def _resolve_staleness(config: Config) -> Config:
    staleness, engines, algorithm = config.rollout.max_staleness, config.engines, config.algorithm
    if not staleness:
        return config
    if engines.colocate or engines.offload_rollout:
        flag = "--colocate" if engines.colocate else "--offload-rollout"
        raise UserError(
            f"--max-staleness {staleness} generates while the trainer trains, and with {flag} both"
            " take turns on the same GPUs. Leave one of them out."
        )
    if algorithm.loss_type == "policy_loss" and not algorithm.use_rollout_logprobs:
        # The ratio must have the policy that sampled below it; see "Old samples" in docs/algorithms.md.
        return replace(config, algorithm=replace(algorithm, use_tis=True))
    return config


def _resolve_algorithm(config: Config) -> Config:
    algorithm, debug = resolve_algorithm(config.algorithm, config.functions), config.debug
    check_critic(config.critic, algorithm)
    if algorithm.loss_type != "sft_loss" and debug.debug_train_only and not debug.load_debug_rollout_data:
        raise UserError(
            "--debug-train-only starts no engines: train with --loss-type sft_loss, or on recorded rollouts with"
            " --load-debug-rollout-data."
        )
    check_temperature(config.rollout)
    return replace(config, algorithm=algorithm)


def _resolve_routing(config: Config) -> Config:
    """Routes of experts that are replayed have to come from the engines, or from a pass of the trainer."""
    algorithm = config.algorithm
    for flag, given in (
        ("--use-routing-replay", algorithm.use_routing_replay),
        ("--use-rollout-routing-replay", algorithm.use_rollout_routing_replay),
    ):
        if given and config.model.megatron.get("transformer", {}).get("moe_router_fusion"):
            raise UserError(
                f"{flag}: the fused router of --moe-router-fusion can't replay routes. Leave one out."
            )
        if given and algorithm.loss_type == "sft_loss":
            raise UserError(f"{flag}: with --loss-type sft_loss no routes exist to replay. Leave it out.")
    if not algorithm.use_rollout_routing_replay:
        return config
    # What the engine did is replayed in all passes of the trainer: there is nothing left to record.
    return replace(config, algorithm=replace(algorithm, use_routing_replay=False))


def _resolve_lora(config: Config) -> Config:
    lora = resolve_lora(config.lora)
    if not lora.lora_rank:
        return config
    refused = {
        "--advantage-estimator ppo: a critic is trained whole": use_critic(config.algorithm),
        "--only-train-params-name-list: only adapters are trained": config.training.only_train_params_name_list,
        "--freeze-params-name-list: only adapters are trained": config.training.freeze_params_name_list,
        "--custom-model-provider-path: adapters are for our own layers": config.functions.custom_model_provider_path,
        "--ckpt-format torch: adapters are saved as torch_dist": config.checkpoint.ckpt_format == "torch",
    }
    if problem := next((words for words, given in refused.items() if given), None):
        raise UserError(f"--lora-rank {lora.lora_rank} does not go with {problem}. Leave one of them out.")
    return replace(config, lora=lora)


def _check_mtp(config: Config) -> None:
    check_mtp_flags(config.mtp)
    if not config.mtp.enable_mtp_training:
        return
    parallel = config.parallel
    refused = {
        f"--context-parallel-size {parallel.context_parallel_size}: its ranks split sequences, and the layer needs"
        " whole ones": parallel.context_parallel_size > 1,
        "virtual pipeline stages: the combination is untested": parallel.num_layers_per_virtual_pipeline_stage
        or parallel.num_virtual_stages_per_pipeline_rank,
        f"--lora-rank {config.lora.lora_rank}: only adapters are trained": config.lora.lora_rank,
        "--custom-model-provider-path: the layer belongs to our own model": config.functions.custom_model_provider_path,
        "--ckpt-format torch: it is saved as torch_dist": config.checkpoint.ckpt_format == "torch",
        "--moe-token-dispatcher-type allgather: ranks have different numbers of tokens in the"
        " layer": config.model.moe_token_dispatcher_type == "allgather",
    }
    if problem := next((words for words, given in refused.items() if given), None):
        raise UserError(f"--enable-mtp-training does not go with {problem}. Leave one of them out.")


def _absolute_paths(config: Config) -> Config:
    """The job may run in another directory than the one it was submitted from."""
    values = config.values()
    return config.replace(**{name: absolute(values[name]) for name in _PATHS if values[name] is not None})


def _check_shared_prompts(config: Config) -> None:
    """Refuse --share-prompts where it cannot be.

    Raises:
        UserError: says why.
    """
    if not config.training.share_prompts:
        return
    if reason := why_separate(
        config.training, config.parallel, config.model, config.algorithm, config.functions
    ):
        raise UserError(f"--share-prompts: {reason}. Without the flag, prompts are shared where it is exact.")
