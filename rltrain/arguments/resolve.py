"""Fill in what follows from other flags, and refuse what can't be right. Pure: looks at no file."""

from __future__ import annotations

import argparse
from pathlib import Path

from rltrain.arguments.algorithm_flags import resolve_algorithm
from rltrain.arguments.checkpoint_flags import resolve_checkpoints
from rltrain.arguments.debug_flags import resolve_debug
from rltrain.arguments.errors import UserError
from rltrain.arguments.eval_sets import resolve_eval_sets
from rltrain.arguments.external import check_external, uses_external_engines
from rltrain.arguments.fleet import read_models
from rltrain.arguments.megatron_flags import resolve_schedule
from rltrain.arguments.parallel import ParallelSizes, check_parallel
from rltrain.arguments.slime_defaults import DEFAULT_ROLLOUT_FUNCTION, SFT_ROLLOUT_FUNCTION

_PATHS = (
    "hf_checkpoint", "load", "ref_load", "save", "save_hf", "wandb_dir", "critic_load", "critic_save",
    "opd_teacher_load", "rollout_external_engines_file",
)  # fmt: skip


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Resolve in place and return the namespace.

    Raises:
        UserError: names the flags that contradict each other, with their values.
    """
    resolve_debug(args)
    _fine_tuning(args)
    _require(args)
    _batch(args)
    _micro_batch(args)
    _parallel(args)
    resolve_schedule(args)
    resolve_checkpoints(args)
    _engines(args)
    _health(args)
    _rollout(args)
    _evaluation(args)
    _staleness(args)
    _algorithm(args)
    _absolute_paths(args)
    return args


def _fine_tuning(args: argparse.Namespace) -> None:
    """Nothing is generated for the loss on given responses, unless a rollout function is named that does so."""
    if args.loss_type == "sft_loss" and args.rollout_function_path == DEFAULT_ROLLOUT_FUNCTION:
        args.rollout_function_path, args.debug_train_only = SFT_ROLLOUT_FUNCTION, True


def _require(args: argparse.Namespace) -> None:
    wanted = {
        "--hf-checkpoint": (args.hf_checkpoint, "the model's Hugging Face directory"),
        "--prompt-data": (
            args.prompt_data or args.prompt_data_mix or args.load_debug_rollout_data,
            "a JSONL or Parquet file of prompts",
        ),
        "--rollout-batch-size": (args.rollout_batch_size, "prompts in a rollout"),
        "--num-rollout": (args.num_rollout or args.num_epoch, "rollouts in the run (or --num-epoch)"),
    }
    missing = [f"{flag} ({what})" for flag, (value, what) in wanted.items() if value is None]
    if missing:
        raise UserError("missing " + ", ".join(missing) + ".")
    for name in ("rollout_batch_size", "n_samples_per_prompt", "num_rollout", "micro_batch_size", "save_interval",
                 "global_batch_size", "num_steps_per_rollout", "max_tokens_per_gpu", "eval_interval",
                 "rollout_max_response_len", "update_weights_interval", "update_weight_buffer_size",
                 "max_skipped_steps", "keep_last_k",
                 "save_retain_interval"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1.")


def _batch(args: argparse.Namespace) -> None:
    samples = args.rollout_batch_size * args.n_samples_per_prompt
    product = (
        f"--rollout-batch-size {args.rollout_batch_size} × --n-samples-per-prompt {args.n_samples_per_prompt}"
    )
    if args.global_batch_size is None:
        steps = args.num_steps_per_rollout or 1
        if samples % steps:
            raise UserError(
                f"{product} = {samples} samples do not divide into --num-steps-per-rollout {steps} optimizer steps."
            )
        args.global_batch_size, args.num_steps_per_rollout = samples // steps, steps
    elif args.num_steps_per_rollout is None:
        if samples % args.global_batch_size:
            raise UserError(
                f"{product} = {samples} samples are no multiple of --global-batch-size {args.global_batch_size}."
            )
        args.num_steps_per_rollout = samples // args.global_batch_size
    elif samples != args.global_batch_size * args.num_steps_per_rollout:
        raise UserError(
            f"{product} = {samples} samples, but --global-batch-size {args.global_batch_size} ×"
            f" --num-steps-per-rollout {args.num_steps_per_rollout} ="
            f" {args.global_batch_size * args.num_steps_per_rollout}: they must be equal. Leave one of the last"
            " two out and it is worked out for you."
        )


def _micro_batch(args: argparse.Namespace) -> None:
    if args.use_dynamic_batch_size and args.max_tokens_per_gpu is None:
        raise UserError(
            "--use-dynamic-batch-size needs --max-tokens-per-gpu: the tokens of a packed micro-batch."
        )
    if args.log_probs_max_tokens_per_gpu is None:
        args.log_probs_max_tokens_per_gpu = args.max_tokens_per_gpu


def _parallel(args: argparse.Namespace) -> None:
    check_parallel(args)
    data = ParallelSizes.of(args).data
    if not args.use_dynamic_batch_size and args.global_batch_size % (data * args.micro_batch_size):
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is no multiple of --micro-batch-size"
            f" {args.micro_batch_size} × {data} data parallel ranks; --use-dynamic-batch-size has no such limit."
        )
    if args.sequence_parallel and args.tensor_model_parallel_size == 1:
        args.sequence_parallel = False
    if args.recompute_granularity == "full" and not (args.recompute_method and args.recompute_num_layers):
        raise UserError("--recompute-granularity full needs --recompute-method and --recompute-num-layers.")


def _engines(args: argparse.Namespace) -> None:
    size = args.rollout_num_gpus_per_engine
    for name in ("offload_train", "offload_rollout"):
        if args.offload or getattr(args, name) is None:
            setattr(args, name, args.offload or args.colocate)
    if args.update_weight_transport == "nccl":  # slime's word
        args.update_weight_transport = "distributed"
    if args.update_weight_transport == "auto" and uses_external_engines(args):
        args.update_weight_transport = "disk"
    if args.update_weight_mode == "delta" and args.update_weight_transport == "tensor":
        raise UserError(
            "--update-weight-mode delta saves nothing with --update-weight-transport tensor, which is for one machine:"
            " leave one of them out."
        )
    if args.update_weight_transport == "tensor" and args.actor_num_nodes > 1:
        raise UserError(
            "--update-weight-transport tensor is for one machine, and --actor-num-nodes is"
            f" {args.actor_num_nodes}: take distributed, or disk with --colocate."
        )
    check_external(args)
    if args.sglang_config:
        _models(args)
        return
    external = uses_external_engines(args)
    if args.rollout_num_gpus is None:
        args.rollout_num_gpus = 0 if external else size
    if size < 1 or args.rollout_num_gpus < (not external) or args.rollout_num_gpus % size:
        raise UserError(
            f"--rollout-num-gpus {args.rollout_num_gpus} is no multiple of --rollout-num-gpus-per-engine {size}."
        )


def _models(args: argparse.Namespace) -> None:
    args.sglang_config = _absolute(args.sglang_config)
    args.sglang_models = read_models(args.sglang_config, args)
    total = sum(group["num_gpus"] for model in args.sglang_models for group in model["groups"])
    if args.rollout_num_gpus not in (None, total):
        raise UserError(
            f"--rollout-num-gpus {args.rollout_num_gpus}, but the groups of --sglang-config have {total} GPUs together."
        )
    args.rollout_num_gpus = total


def _health(args: argparse.Namespace) -> None:
    for name, least in (("interval", 0.1), ("timeout", 0.1), ("first_wait", 0.0)):
        value = getattr(args, f"rollout_health_check_{name}")
        if not least <= value < float("inf"):
            flag = f"--rollout-health-check-{name.replace('_', '-')}"
            raise UserError(f"{flag} {value:g}: a number of seconds, at least {least:g}, is needed.")


def _rollout(args: argparse.Namespace) -> None:
    if args.over_sampling_batch_size is None:
        args.over_sampling_batch_size = args.rollout_batch_size
    if args.over_sampling_batch_size < args.rollout_batch_size:
        raise UserError(
            f"--over-sampling-batch-size {args.over_sampling_batch_size} is less than --rollout-batch-size"
            f" {args.rollout_batch_size}: it is how many prompts are sampled to get that many."
        )
    if args.mask_offpolicy_in_partial_rollout and not args.partial_rollout:
        raise UserError("--mask-offpolicy-in-partial-rollout needs --partial-rollout.")
    _prompt_mix(args)
    if not 0 <= args.max_failed_fraction <= 1:
        raise UserError(f"--max-failed-fraction {args.max_failed_fraction}: it is between 0 and 1.")


def _staleness(args: argparse.Namespace) -> None:
    if args.max_staleness < 0:
        raise UserError(f"--max-staleness {args.max_staleness}: it must be at least 0, which is on-policy.")
    if not args.max_staleness:
        return
    if args.colocate or args.offload_rollout:
        flag = "--colocate" if args.colocate else "--offload-rollout"
        raise UserError(
            f"--max-staleness {args.max_staleness} generates while the trainer trains, and with {flag} both"
            " take turns on the same GPUs. Leave one of them out."
        )
    if args.loss_type == "policy_loss" and not args.use_rollout_logprobs:
        # The ratio must have the policy that sampled below it; see "Old samples" in docs/algorithms.md.
        args.use_tis = True


def _prompt_mix(args: argparse.Namespace) -> None:
    mix = args.prompt_data_mix or []
    if mix and args.prompt_data:
        raise UserError("--prompt-data and --prompt-data-mix: give one of them.")
    if len(mix) % 2:
        raise UserError(
            f"--prompt-data-mix takes pairs of a file and a weight, but {len(mix)} words were given."
        )
    for word in mix[1::2]:
        try:
            positive = float(word) > 0
        except ValueError:
            positive = False
        if not positive:
            raise UserError(f"--prompt-data-mix: the weight {word!r} is no number greater than 0.")


def _evaluation(args: argparse.Namespace) -> None:
    for name in ("input_key", "label_key", "reward_key", "tool_key"):
        if getattr(args, f"eval_{name}") is None:
            setattr(args, f"eval_{name}", getattr(args, name))
    for name in ("temperature", "top_p", "top_k", "max_response_len"):
        if getattr(args, f"eval_{name}") is None:
            setattr(args, f"eval_{name}", getattr(args, f"rollout_{name}"))
    args.eval_datasets = resolve_eval_sets(args)
    if args.eval_interval is not None and not args.eval_datasets:
        raise UserError("--eval-interval needs --eval-prompt-data NAME FILE, or --eval-config.")
    if args.eval_datasets and args.debug_train_only:
        raise UserError("--eval-prompt-data needs engines, and --debug-train-only starts none.")


def _algorithm(args: argparse.Namespace) -> None:
    resolve_algorithm(args)
    if args.loss_type != "sft_loss" and args.debug_train_only and not args.load_debug_rollout_data:
        raise UserError(
            "--debug-train-only starts no engines: train with --loss-type sft_loss, or on recorded rollouts with"
            " --load-debug-rollout-data."
        )
    if args.rollout_temperature <= 0:
        raise UserError(
            "--rollout-temperature must be positive: training needs samples, not the greedy response."
        )


def _absolute_paths(args: argparse.Namespace) -> None:
    """The job may run in another directory than the one it was submitted from."""
    for name in _PATHS:
        if getattr(args, name) is not None:
            setattr(args, name, _absolute(getattr(args, name)))
    if args.prompt_data is not None:
        args.prompt_data = _absolute(args.prompt_data)
    if args.prompt_data_mix:
        args.prompt_data_mix = [
            word if i % 2 else _absolute(word) for i, word in enumerate(args.prompt_data_mix)
        ]
    if args.eval_prompt_data:
        args.eval_prompt_data = [
            word if i % 2 == 0 else _absolute(word) for i, word in enumerate(args.eval_prompt_data)
        ]


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
