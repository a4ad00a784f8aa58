"""Which parameters are trained: --only-train-params-name-list and --freeze-params-name-list."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import torch
import torch.distributed as dist

from rltrain.arguments.errors import UserError
from rltrain.megatron.device import device


def freeze(models: Sequence[torch.nn.Module], args: argparse.Namespace) -> None:
    """Switch gradients off where the flags say so; before the chunks of a model get its gradient buffers.

    The lists hold regular expressions, looked for anywhere in Megatron-core's names.

    Raises:
        UserError: both are given, one matches nothing on any rank, or nothing is left to train.
    """
    only, frozen = args.only_train_params_name_list, args.freeze_params_name_list
    if only and frozen:
        raise UserError("--only-train-params-name-list and --freeze-params-name-list: give one of them.")
    if not only and not frozen:
        return
    flag = "--only-train-params-name-list" if only else "--freeze-params-name-list"
    patterns = _compiled(flag, only or frozen)
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
            raise UserError(f"{flag} {pattern}: no regular expression ({error}).") from None
    return compiled
