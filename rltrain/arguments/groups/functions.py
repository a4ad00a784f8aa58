"""Functions of your own, by import path: each has a flag, slime's signature and a purpose.

Each function is checked before anything starts: it exists, and it takes its arguments. docs/extending.md shows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rltrain.arguments.declare import declared, flag, function
from rltrain.run.errors import UserError

DEFAULT_ROLLOUT_FUNCTION = "rltrain.rollout.sglang_rollout.generate_rollout"
SFT_ROLLOUT_FUNCTION = "rltrain.rollout.sft_rollout.generate_rollout"
DEFAULT_DATA_SOURCE = "rltrain.data.source.RolloutDataSource"


@dataclass(frozen=True)
class Functions:
    """Functions of your own."""

    rollout_function_path: str = function(
        "makes a batch, or an evaluation",
        DEFAULT_ROLLOUT_FUNCTION,
        positional=("args", "rollout_id", "data_source"),
        keywords=("evaluation",),
        coroutine=None,
    )
    eval_function_path: str | None = function(
        "makes an evaluation (default: the rollout function)",
        positional=("args", "rollout_id", "data_source"),
        keywords=("evaluation",),
        coroutine=None,
    )
    custom_generate_function_path: str | None = function(
        "fills one sample",
        positional=("args", "sample", "sampling_params"),
        optional=("evaluation",),
        coroutine=True,
    )
    agent_function_path: str | None = function(
        "an agent: calls session.base_url with session.api_key, and returns its answer, or the reward",
        positional=("session", "sample"),
        coroutine=True,
        owner="slurmlime",
    )
    custom_rm_path: str | None = function(
        "returns the reward (with --group-rm: the rewards of a list of samples)",
        positional=("args", "sample"),
        coroutine=None,
    )
    dynamic_sampling_filter_path: str | None = function(
        "says whether a graded group is kept", positional=("args", "samples")
    )
    buffer_filter_path: str | None = function(
        "takes groups from the buffer of groups that were given back",
        positional=("args", "rollout_id", "buffer", "num_samples"),
    )
    rollout_sample_filter_path: str | None = function(
        "sets remove_sample on samples not to train on", positional=("args", "groups")
    )
    rollout_sample_hook_path: list[str] = function(
        "sees each sample before its reward; repeatable",
        [],
        positional=("args", "sample"),
        optional=("rollout_id", "evaluation"),
        coroutine=None,
        append=True,
    )
    rollout_all_samples_process_path: str | None = function(
        "sees all groups, including filtered ones", positional=("args", "samples", "data_source")
    )
    rollout_data_postprocess_path: str | None = function(
        "changes the finished groups or, with arguments (args, rollout_id, rollout_data), a trainer rank's data",
        positional=("args", "samples"),
        or_positional=("args", "rollout_id", "rollout_data"),
    )
    custom_reward_post_process_path: str | None = function(
        "returns the raw rewards and the rewards to train on", positional=("args", "samples")
    )
    custom_convert_samples_to_train_data_path: str | None = function(
        "returns the training data as a dict", positional=("args", "samples")
    )
    custom_rollout_log_function_path: str | None = function(
        "makes the metrics of a batch; returns True to replace ours",
        positional=("rollout_id", "args", "samples", "rollout_extra_metrics", "rollout_time"),
    )
    custom_eval_rollout_log_function_path: str | None = function(
        "the same for evaluations", positional=("rollout_id", "args", "data", "extra_metrics")
    )
    data_source_path: str = function(
        "class that hands out prompts", DEFAULT_DATA_SOURCE, positional=("args",)
    )
    custom_megatron_init_path: str | None = function("called before the model is built", positional=("args",))
    custom_megatron_before_log_prob_hook_path: str | None = function(
        "called before log-probs are computed, with the prefix '', ref_ or teacher_",
        positional=("args", "model", "store_prefix"),
        older="--custom-megatron-before-log-prob-hook",
    )
    custom_megatron_before_train_step_hook_path: str | None = function(
        "called before every optimizer step",
        positional=("args", "rollout_id", "step_id", "model", "optimizer", "opt_param_scheduler"),
        older="--custom-megatron-before-train-step-hook",
    )
    custom_model_provider_path: str | None = function(
        "builds this rank's part of the model",
        keywords=("pre_process", "post_process"),
        optional=("vp_stage", "config", "args"),
    )
    custom_loss_function_path: str | None = function(
        "with custom_loss: function(args, batch, logits, sum_of_sample_mean) that returns the loss and metrics",
        positional=("args", "batch", "logits", "sum_of_sample_mean"),
    )
    custom_advantage_function_path: str | None = function(
        "function(args, rollout_data) that sets rollout_data['advantages']",
        positional=("args", "rollout_data"),
    )
    custom_tis_function_path: str | None = function(
        "replaces the correction of --use-tis, for example rltrain.algorithms.mismatch.icepop",
        keywords=(
            "args",
            "pg_loss",
            "train_log_probs",
            "rollout_log_probs",
            "loss_masks",
            "total_lengths",
            "response_lengths",
        ),
    )
    custom_pg_loss_reducer_function_path: str | None = function(
        "function of lengths and masks that returns another reduction of the policy loss",
        positional=("total_lengths", "response_lengths", "loss_masks", "calculate_per_token_loss"),
    )
    custom_config_path: str | None = flag(
        "TOML, JSON or YAML: further attributes of args", metavar="FILE", owner="slurmlime"
    )


def check_functions(functions: Functions) -> None:
    """Check that every function that the flags name exists and takes its arguments.

    Raises:
        UserError: names the flag and the function, and how it is called.
    """
    from rltrain.functions import check_function

    how: dict[str, Any]
    for each in declared(Functions):
        call, given = each.flag.call, getattr(functions, each.name)
        for path in given if isinstance(given, list) else [given]:
            if path and call is not None:
                how = {"flag": each.option, "keywords": call.keywords, "optional": call.optional,
                       "coroutine": call.coroutine}  # fmt: skip
                try:
                    check_function(path, positional=call.positional, **how)
                except UserError:
                    if call.or_positional is None:
                        raise
                    check_function(path, positional=call.or_positional, **how)


def absent_of(functions: Functions) -> list[str]:
    """What the functions' modules import at their top and this Python has not: one line each, with the flag."""
    from rltrain.functions import missing_imports

    given = [(each.option, getattr(functions, each.name)) for each in declared(Functions) if each.flag.call]
    paths = [
        (option, path)
        for option, value in given
        for path in (value if isinstance(value, list) else [value])
        if path
    ]
    return [f"{option} {path}: {line}" for option, path in paths for line in missing_imports(path)]
