"""From finished groups to what is trained on: masks, normalised rewards, and the user's functions that change them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.algorithms.grpo import leave_one_out, normalize_rewards
from rltrain.arguments.config import Config
from rltrain.arguments.groups.algorithm import Algorithm
from rltrain.arguments.groups.functions import Functions
from rltrain.arguments.groups.rollout import Rewards
from rltrain.functions import load_function
from rltrain.rollout.generate.http import GenerationError
from rltrain.rollout.generate.returned import check_fields
from rltrain.run.errors import UserError
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


def to_train_data(config: Config, samples: list[Sample]) -> TrainData:
    """Mask the samples that are not trained on, and normalise the rewards.

    Raises:
        UserError: a function of the user returned something that can't be trained on; names it and the sample.
    """
    check_samples(config.functions, config.rewards, samples, _CHANGES_SAMPLES)
    for sample in samples:
        if sample.status in UNUSABLE or sample.remove_sample:
            sample.loss_mask = [0] * sample.response_length
    if config.functions.custom_convert_samples_to_train_data_path:
        return _converted(config, samples)
    if config.functions.custom_reward_post_process_path:
        return _post_processed(config, samples)
    rewards = [graded_reward(config.rewards, sample) for sample in samples]
    return TrainData(samples, rewards, train_rewards(config.algorithm, samples, rewards))


def check_samples(
    functions: Functions, rewards: Rewards, samples: Sequence[Sample], flags: Sequence[str]
) -> None:
    """Check that the samples are still valid after the user's functions that `flags` name.

    Raises:
        UserError: names these functions, the sample and the field that is wrong.
    """
    paths = {flag: getattr(functions, flag.removeprefix("--").replace("-", "_")) for flag in flags}
    theirs = [f"{flag} {path}" for flag, path in paths.items() if path and not path.startswith("rltrain.")]
    for i, sample in enumerate(samples if theirs else ()):
        try:
            check_fields(rewards, sample, f"{' or '.join(theirs)}: sample {i}")
        except GenerationError as error:
            raise UserError(f"{error}.") from None


def graded_reward(rewards: Rewards, sample: Sample) -> float | None:
    """The sample's scalar reward; None if it has none.

    Raises:
        UserError: it is a dict, and there is no --reward-key.
    """
    if sample.status in UNUSABLE or sample.reward is None:
        return None
    reward = sample.get_reward_value(rewards)
    if isinstance(reward, dict):
        raise UserError(
            f"the reward is a dict with {', '.join(map(repr, reward))}: name one with --reward-key (--eval-reward-key"
            " for evaluations), or turn it into a number with --custom-reward-post-process-path."
        )
    return float(reward)


def train_rewards(
    algorithm: Algorithm, samples: Sequence[Sample], rewards: Sequence[float | None]
) -> list[float]:
    """One number a sample; 0 for a sample without reward, which its group's statistics leave out too.

    GRPO, GSPO and CISPO subtract the group's mean and divide by its standard deviation; RLOO subtracts the mean
    of the others; REINFORCE++-baseline subtracts the mean. REINFORCE++ and PPO have no groups: rewards stay as
    they are. A rollout of several samples counts once in its group.
    """
    groups = [sample.group_index for sample in samples]
    rollouts = [i if sample.rollout_key is None else sample.rollout_key for i, sample in enumerate(samples)]
    values = [0.0 if reward is None else float(reward) for reward in rewards]
    graded = [reward is not None for reward in rewards]
    match algorithm.advantage_estimator if algorithm.rewards_normalization else "reinforce_plus_plus":
        case "reinforce_plus_plus" | "ppo":
            return values
        case "rloo":
            return leave_one_out(values, groups, mask=graded, rollout_ids=rollouts)
        case "reinforce_plus_plus_baseline":
            return normalize_rewards(values, groups, std=False, mask=graded, rollout_ids=rollouts)
    std = algorithm.grpo_std_normalization
    return normalize_rewards(values, groups, std=std, mask=graded, rollout_ids=rollouts)


def _post_processed(config: Config, samples: list[Sample]) -> TrainData:
    path = config.functions.custom_reward_post_process_path
    where = f"--custom-reward-post-process-path {path}"
    result = load_function(path, flag="--custom-reward-post-process-path")(config.namespace, samples)
    if not isinstance(result, tuple) or len(result) != 2:
        raise UserError(f"{where} returned a {type(result).__name__}; expected (raw_rewards, rewards).")
    raw, trained = (_numbers(values, len(samples), where) for values in result)
    usable = [sample.status not in UNUSABLE for sample in samples]
    _check_finite(where, "rewards", [value if ok else 0.0 for value, ok in zip(trained, usable, strict=True)])
    return TrainData(
        samples,
        [value if ok and value is not None else None for value, ok in zip(raw, usable, strict=True)],
        [value if ok and value is not None else 0.0 for value, ok in zip(trained, usable, strict=True)],
    )


def _converted(config: Config, samples: list[Sample]) -> TrainData:
    """The samples that --custom-convert-samples-to-train-data-path returns: it may change, drop or add some."""
    path = config.functions.custom_convert_samples_to_train_data_path
    where = f"--custom-convert-samples-to-train-data-path {path}"
    data = load_function(path, flag="--custom-convert-samples-to-train-data-path")(config.namespace, samples)
    if not isinstance(data, dict):
        raise UserError(f"{where} returned a {type(data).__name__}; expected a dict.")
    missing = [name for name in _LISTS if name not in data]
    if missing:
        raise UserError(f"{where}: the dict has no {missing[0]!r}; it must have {', '.join(_LISTS)}.")
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
        raise UserError(f"{where}: expected {count} rewards, one per sample, not {values!r:.200}.")
    try:
        return [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise UserError(f"{where}: a reward is not a number: {values!r:.200}.") from None


def _check_finite(where: str, name: str, values: Sequence[float | None]) -> None:
    for i, value in enumerate(values):
        if value is None or not math.isfinite(value):
            raise UserError(f"{where}: sample {i}: {name} is {value}; expected a finite number.")
