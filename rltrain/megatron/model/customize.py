"""What users may change about the model: who builds it, what of it is trained, and hooks round its work.

Functions of the user are called with slime's signatures.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from rltrain.arguments.config import Config
from rltrain.arguments.groups.training import Training
from rltrain.functions import load_function
from rltrain.megatron.device import device
from rltrain.run.errors import UserError

_FLAG = "--custom-model-provider-path"


def custom_model(
    run_config: Config,
    config: TransformerConfig,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> GPTModel:
    """This rank's chunk of the model, as the user's function builds it.

    It is called as slime calls it, with `pre_process` and `post_process`, and with `vp_stage` if it takes that.
    `config` and `args` are given to functions that have such parameters too, because there is no global state
    to get them from.

    Raises:
        UserError: it returned something other than a GPTModel.
    """
    function = load_function(run_config.functions.custom_model_provider_path, flag=_FLAG)
    optional = {"vp_stage": vp_stage, "config": config, "args": run_config.namespace}
    taken = inspect.signature(function).parameters
    own = {name: value for name, value in optional.items() if name in taken}
    model = function(pre_process=pre_process, post_process=post_process, **own)
    if not isinstance(model, GPTModel):
        raise UserError(
            f"{_FLAG} {run_config.functions.custom_model_provider_path} returned a {type(model).__name__};"
            " expected megatron-core's GPTModel."
        )
    return model


def freeze(models: Sequence[torch.nn.Module], training: Training) -> None:
    """Switch gradients off where the flags say so; before the chunks of a model get its gradient buffers.

    The lists hold regular expressions, looked for anywhere in Megatron-core's names.

    Raises:
        UserError: both are given, one matches nothing on any rank, or nothing is left to train.
    """
    only, frozen = training.only_train_params_name_list, training.freeze_params_name_list
    if only and frozen:
        raise UserError("--only-train-params-name-list and --freeze-params-name-list: give one of them.")
    if not only and not frozen:
        return
    flag = "--only-train-params-name-list" if only else "--freeze-params-name-list"
    patterns = _compiled(flag, only or frozen or [])
    matched = torch.zeros(len(patterns) + 1, dtype=torch.int64)
    named = [each for model in models for each in model.named_parameters()]
    for name, parameter in named:
        hits = torch.tensor([pattern.search(name) is not None for pattern in patterns])
        parameter.requires_grad_(bool(hits.any()) == bool(only))
        matched[:-1] += hits
        matched[-1] += parameter.requires_grad
    matched = matched.to(device())
    dist.all_reduce(matched)  # a pipeline stage may have none of them
    for pattern, count in zip(patterns, matched.tolist(), strict=False):
        if not count:
            names = ", ".join(name for name, _ in named[:3])
            raise UserError(f"{flag}: no parameter matches {pattern.pattern!r}; names look like {names}.")
    if not matched[-1]:
        raise UserError(f"{flag} leaves no parameter to train.")


def _compiled(flag: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"{flag} {pattern}: not a regular expression ({error}).") from None
    return compiled


def call_at_start(config: Config) -> Config:
    """Call --custom-megatron-init-path, before the model is built.

    Returns:
        The configuration with what the function has set on `args`.
    """
    path = config.functions.custom_megatron_init_path
    if path is None:
        return config
    load_function(path, flag="--custom-megatron-init-path")(config.namespace)
    return Config.of(config.namespace)


def call_before_log_probs(config: Config, models: Sequence[torch.nn.Module], prefix: str) -> None:
    """Call --custom-megatron-before-log-prob-hook-path.

    Args:
        models: This rank's chunks of the model.
        prefix: Whose log-probs are computed: `ref_`, `teacher_`, or nothing for the policy's.
    """
    path = config.functions.custom_megatron_before_log_prob_hook_path
    if path:
        load_function(path, flag="--custom-megatron-before-log-prob-hook-path")(
            config.namespace, models, prefix
        )


def call_before_step(
    config: Config,
    rollout_id: int,
    step: int,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> None:
    """Call --custom-megatron-before-train-step-hook-path, before an optimizer step of a rollout."""
    path = config.functions.custom_megatron_before_train_step_hook_path
    if path:
        hook = load_function(path, flag="--custom-megatron-before-train-step-hook-path")
        hook(config.namespace, rollout_id, step, models, optimizer, scheduler)
