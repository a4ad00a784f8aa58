"""From finished groups to what is trained on: masks, rewards, and the functions of the user that change them."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.arguments.errors import UserError
from rltrain.functions import load_function
from rltrain.rollout.generated import check_fields
from rltrain.rollout.http import GenerationError
from rltrain.rollout.normalize import train_rewards
from rltrain.sample import Sample

UNUSABLE = (Sample.Status.FAILED, Sample.Status.ABORTED)
_CHANGES_SAMPLES = (
    "--rollout-function-path", "--rollout-sample-filter-path", "--rollout-all-samples-process-path",
    "--rollout-data-postprocess-path",
)  # fmt: skip
_LISTS = ("tokens", "response_lengths", "rewards", "loss_masks")


@dataclass(frozen=True)
class TrainData:
    """What becomes the rows of a batch; one entry a sample."""

    samples: list[Sample]
    rewards: list[float | None]  # as graded; None: not graded
    train_rewards: list[float]


def to_train_data(args: argparse.Namespace, samples: list[Sample]) -> TrainData:
    """Mask what nothing is trained on, and normalise the rewards.

    Raises:
        UserError: a function of the user returned something that can't be trained on; names it and the sample.
    """
    check_samples(args, samples, _CHANGES_SAMPLES)
    for sample in samples:
        if sample.status in UNUSABLE or sample.remove_sample:
            sample.loss_mask = [0] * sample.response_length
    if args.custom_convert_samples_to_train_data_path:
        return _converted(args, samples)
    rewards = [graded_reward(args, sample) for sample in samples]
    if args.custom_reward_post_process_path:
        return _post_processed(args, samples)
    return TrainData(samples, rewards, train_rewards(args, samples, rewards))


def check_samples(args: argparse.Namespace, samples: Sequence[Sample], flags: Sequence[str]) -> None:
    """See that the samples are still in order after the functions of the user that `flags` name.

    Raises:
        UserError: names these functions, the sample and the field that is wrong.
    """
    paths = {flag: getattr(args, flag.removeprefix("--").replace("-", "_")) for flag in flags}
    theirs = [f"{flag} {path}" for flag, path in paths.items() if path and not path.startswith("rltrain.")]
    for i, sample in enumerate(samples if theirs else ()):
        try:
            check_fields(args, sample, f"{' or '.join(theirs)}: sample {i}")
        except GenerationError as error:
            raise UserError(f"{error}.") from None


def graded_reward(args: argparse.Namespace, sample: Sample) -> float | None:
    """The sample's scalar reward; None if it has none."""
    if sample.status in UNUSABLE or sample.reward is None:
        return None
    return float(sample.get_reward_value(args))


def _post_processed(args: argparse.Namespace, samples: list[Sample]) -> TrainData:
    path = args.custom_reward_post_process_path
    where = f"--custom-reward-post-process-path {path}"
    result = load_function(path, flag="--custom-reward-post-process-path")(args, samples)
    if not isinstance(result, tuple) or len(result) != 2:
        raise UserError(
            f"{where} returned a {type(result).__name__}, where (raw_rewards, rewards) is wanted."
        )
    raw, trained = (_numbers(values, len(samples), where) for values in result)
    usable = [sample.status not in UNUSABLE for sample in samples]
    _check_finite(where, "rewards", [value if ok else 0.0 for value, ok in zip(trained, usable, strict=True)])
    return TrainData(
        samples,
        [value if ok and value is not None else None for value, ok in zip(raw, usable, strict=True)],
        [value if ok and value is not None else 0.0 for value, ok in zip(trained, usable, strict=True)],
    )


def _converted(args: argparse.Namespace, samples: list[Sample]) -> TrainData:
    """What --custom-convert-samples-to-train-data-path returns, as samples again: it may change, drop or add."""
    path = args.custom_convert_samples_to_train_data_path
    where = f"--custom-convert-samples-to-train-data-path {path}"
    data = load_function(path, flag="--custom-convert-samples-to-train-data-path")(args, samples)
    if not isinstance(data, dict):
        raise UserError(f"{where} returned a {type(data).__name__}, where a dict is wanted.")
    missing = [name for name in _LISTS if name not in data]
    if missing:
        raise UserError(f"{where}: the dict has no {missing[0]!r}; {', '.join(_LISTS)} are wanted.")
    count = len(data["tokens"])
    if not count:
        raise UserError(f"{where}: nothing is left to train on.")
    for name, values in data.items():
        if isinstance(values, Sequence) and len(values) != count:
            raise UserError(f"{where}: {name} has {len(values)} entries, and tokens has {count}.")
    trained = _numbers(data["rewards"], count, where)
    _check_finite(where, "rewards", trained)
    by_index = {sample.index: sample for sample in samples}
    unchanged = [sample.index for sample in samples] if count == len(samples) else [None] * count
    indices = data.get("sample_indices", unchanged)
    converted = [
        _sample(data, i, by_index.get(indices[i], Sample(index=indices[i])), where) for i in range(count)
    ]
    raw = _numbers(data.get("raw_reward", data["rewards"]), count, where)
    return TrainData(converted, raw, [float(value or 0.0) for value in trained])


def _sample(data: dict[str, Any], i: int, base: Sample, where: str) -> Sample:
    tokens, length = [int(token) for token in data["tokens"][i]], int(data["response_lengths"][i])
    mask = [int(entry) for entry in data["loss_masks"][i]]
    log_probs = data["rollout_log_probs"][i] if "rollout_log_probs" in data else None
    if not 0 <= length <= len(tokens):
        raise UserError(f"{where}: sample {i}: response_lengths is {length} with {len(tokens)} tokens.")
    for name, values in (("loss_masks", mask), ("rollout_log_probs", log_probs)):
        if values is not None and len(values) != length:
            raise UserError(
                f"{where}: sample {i}: {name} has {len(values)} entries for {length} response tokens."
            )
    return dataclasses.replace(
        base,
        rollout_id=data["rollout_ids"][i] if "rollout_ids" in data else base.rollout_id,
        tokens=tokens,
        response_length=length,
        loss_mask=mask,
        rollout_log_probs=None if log_probs is None else [float(value) for value in log_probs],
    )


def _numbers(values: Any, count: int, where: str) -> list[float | None]:
    """Numbers or None; a tensor or an array is taken too."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or len(values) != count:
        raise UserError(f"{where}: {count} rewards are wanted, one a sample, and not {values!r:.200}.")
    try:
        return [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise UserError(f"{where}: a reward is no number: {values!r:.200}.") from None


def _check_finite(where: str, name: str, values: Sequence[float | None]) -> None:
    for i, value in enumerate(values):
        if value is None or not math.isfinite(value):
            raise UserError(f"{where}: sample {i}: {name} is {value}, where a finite number is wanted.")
