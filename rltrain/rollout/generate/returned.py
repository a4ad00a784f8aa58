"""What a generation function or a hook returned: one finished sample, or several that were one rollout. Checked."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from typing import Any

from rltrain.arguments.groups.rollout import Rewards
from rltrain.rewards.worker import checked
from rltrain.rollout.generate.http import GenerationError
from rltrain.sample import Sample

# The k-th further sample of a rollout has the index of the first one plus k times this: unique in the run.
SIBLING_STRIDE = 1 << 32

_TYPES: tuple[tuple[str, type, str], ...] = (
    ("status", Sample.Status, "a Sample.Status"),
    ("response", str, "a text"),
    ("response_length", int, "a whole number"),
    ("metadata", dict, "a dict"),
    ("weight_versions", list, "a list"),
)


def as_rollout(rewards: Rewards, result: Any, sample: Sample, function: Callable[..., Any]) -> list[Sample]:
    """The samples of one rollout from what the generation function returned for `sample`.

    It may be another sample, which gets what it lacks from `sample`: group, prompt, label, metadata. A list is for
    agents that are trained on several texts. Its samples share the `rollout_id` of `sample` (its own, or its index),
    and get the same from it.

    Raises:
        GenerationError: names the function, the sample of the list and the field that is wrong.
    """
    name = name_of(function)
    if not isinstance(result, list):
        if isinstance(result, Sample) and result is not sample:
            _adopt(result, sample, 0, name)
            _check_finished(rewards, result, name)
            return [result]
        return [check_sample(rewards, result, sample, name)]
    if not result:
        raise GenerationError(f"{name} returned an empty list; expected one or more samples")
    for k, each in enumerate(result):
        where = f"{name}: sample {k} of {len(result)}"
        if not isinstance(each, Sample):
            raise GenerationError(f"{where} is a {type(each).__name__}, not a Sample")
        if any(each is other for other in result[:k]):
            raise GenerationError(f"{where} is the same object as one before it: copy it")
        _adopt(each, sample, k, where)
        _check_finished(rewards, each, where)
    return result


def check_sample(rewards: Rewards, result: Any, sample: Sample, name: str) -> Sample:
    """Check that `name` returned the sample that it was given, with valid fields.

    Raises:
        GenerationError: see `as_rollout`.
    """
    if result is not sample:
        raise GenerationError(f"{name} returned a {type(result).__name__}, not the sample that it was given")
    _check_finished(rewards, sample, name)
    return sample


def name_of(function: Callable[..., Any]) -> str:
    """How messages call a function: `module.name`."""
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"


def check_fields(rewards: Rewards, sample: Sample, where: str) -> None:
    """Check that a sample's fields have the right types and lengths.

    Raises:
        GenerationError: begins with `where`, and names the field.
    """
    for field, kind, wanted in _TYPES:
        value = getattr(sample, field)
        if not isinstance(value, kind):
            raise GenerationError(f"{where}: {field} is a {type(value).__name__}; expected {wanted}")
    for field in ("multimodal_inputs", "multimodal_train_inputs"):
        if getattr(sample, field):
            raise GenerationError(
                f"{where}: {field} is set, but models that take images or sound can't be trained here: leave it None"
            )
    _check_numbers(sample.tokens, "q", "whole numbers", f"{where}: tokens")
    if not 0 <= sample.response_length <= len(sample.tokens):
        raise GenerationError(
            f"{where}: response_length {sample.response_length} with {len(sample.tokens)} tokens"
        )
    for field in ("loss_mask", "rollout_log_probs", "teacher_log_probs"):
        values = getattr(sample, field)
        if values is not None and len(values) != sample.response_length:
            raise GenerationError(
                f"{where}: {field} has {len(values)} entries for {sample.response_length} response tokens"
            )
    if sample.loss_mask is not None and not set(sample.loss_mask) <= {0, 1}:
        raise GenerationError(f"{where}: loss_mask holds values other than 0 and 1")
    if sample.rollout_log_probs is not None:
        log_probs = _check_numbers(sample.rollout_log_probs, "d", "numbers", f"{where}: rollout_log_probs")
        if not math.isfinite(sum(log_probs)):
            raise GenerationError(f"{where}: rollout_log_probs holds something that is not a finite number")
    if sample.reward is not None:
        try:
            checked(sample.reward, rewards.reward_key)
        except ValueError as error:
            raise GenerationError(f"{where}: {error}") from None


def _check_finished(rewards: Rewards, sample: Sample, where: str) -> None:
    check_fields(rewards, sample, where)
    if sample.status is Sample.Status.PENDING:
        raise GenerationError(f"{where} left the sample's status at PENDING")


def _check_numbers(values: Any, code: str, wanted: str, where: str) -> array[Any]:
    try:
        return array(code, values)
    except (TypeError, OverflowError) as error:
        raise GenerationError(f"{where} is not a list of {wanted} ({error})") from None


def _adopt(each: Sample, parent: Sample, k: int, where: str) -> None:
    """Give a sample of a list its place, and take what it lacks from its parent."""
    for field, own in (("rollout_id", parent.rollout_key), ("group_index", parent.group_index)):
        value = getattr(each, field)
        if value is not None and value != own:
            raise GenerationError(f"{where}: {field} is {value!r}; expected its prompt's, {own!r}")
        setattr(each, field, own)
    if parent.index is not None:
        each.index = parent.index % SIBLING_STRIDE + k * SIBLING_STRIDE
    each.prompt = each.prompt or parent.prompt
    each.label = parent.label if each.label is None else each.label
    each.metadata = each.metadata or dict(parent.metadata)
