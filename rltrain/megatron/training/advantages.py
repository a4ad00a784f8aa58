"""The advantage of every token that this rank trains on, from rewards, log-probs and values.

The only place of the trainer that makes advantages; the mathematics are `rltrain.algorithms.estimators`. Rewards come
normalised within their groups: the rollout process does that (`rltrain.rollout.train_data`), because the Parquet file
has what a sample was trained on (`train_reward`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray

from rltrain.algorithms.estimators import (
    discounted_returns,
    generalized_advantages,
    reverse_kl,
    token_rewards,
    whiten,
    with_distillation,
    with_kl_penalty,
)
from rltrain.algorithms.losses import approximate_kl
from rltrain.arguments.config import Config
from rltrain.arguments.groups.algorithm import Algorithm
from rltrain.data.batch import Flat, joined, split_rows
from rltrain.functions import load_function
from rltrain.megatron.device import device
from rltrain.megatron.training.micro_batch import LossInputs
from rltrain.megatron.training.rollout_data import (
    BySample,
    RolloutData,
    flat,
    post_processed,
    post_processes,
)
from rltrain.megatron.training.share import RankShare

Floats = NDArray[np.float32]


def with_advantages(
    config: Config, share: RankShare, inputs: LossInputs[Flat], rollout_id: int
) -> LossInputs[Flat]:
    """The inputs with what --advantage-estimator makes of the rewards, whitened with --normalize-advantages.

    Args:
        share: This rank's samples.
        inputs: With `old_log_probs` and `ref_log_probs` where there is a KL penalty, `old_values` for PPO, and
            `teacher_log_probs` for distillation.

    Returns:
        The inputs with `advantages`; for PPO also `returns`, and for distillation `opd_reverse_kl`. Without
        --compute-advantages-and-returns they are as they were.

    Raises:
        ValueError: a sample that is trained on has no reward, or a custom function returned something else.
    """
    if config.algorithm.compute_advantages_and_returns:
        inputs = _with_advantages(config, share, inputs)
    inputs = post_processed(config, share, inputs, rollout_id)
    known_before = (
        config.algorithm.use_rollout_logprobs
        or config.algorithm.keep_old_actor
        or config.algorithm.loss_type == "custom_loss"
        or post_processes(config.functions)
    )
    if share.num_steps == 1 and not known_before:
        # The current log-probs, see `loss.policy_token_loss`: exactly, whatever the micro-batches were.
        inputs = replace(inputs, old_log_probs=None)
    return inputs


def _with_advantages(config: Config, share: RankShare, inputs: LossInputs[Flat]) -> LossInputs[Flat]:
    batch, samples = share.batch, share.samples
    missing = [i for i in np.flatnonzero(np.isnan(batch.train_rewards)).tolist() if share.trainable.count(i)]
    if missing:
        raise ValueError(f"samples {missing} have no reward (or NaN) but are trained on")
    kl = _kl(config.algorithm, share, inputs)
    returns: BySample | None = None
    distances: BySample | None = None
    if config.functions.custom_advantage_function_path:
        result, returns = _custom(config, share, inputs, kl)
    elif config.algorithm.advantage_estimator == "ppo":
        result, returns = _with_critic(config.algorithm, share, inputs, kl)
    else:
        result = _without_critic(config.algorithm, batch.train_rewards, kl)
    if config.algorithm.use_opd:
        distances = _distances_to_teacher(samples, inputs)
        result = {
            i: with_distillation(result[i], distances[i], opd_kl_coef=config.algorithm.opd_kl_coef)
            for i in samples
        }
    if config.algorithm.normalize_advantages:
        whitened = whiten([result[i] for i in samples], _sum_over_data_parallel_ranks)
        result = dict(zip(samples, whitened, strict=True))
    return replace(
        inputs,
        advantages=flat(result, len(batch)),
        returns=None if returns is None else flat(returns, len(batch)),
        opd_reverse_kl=None if distances is None else flat(distances, len(batch)),
    )


def _distances_to_teacher(samples: list[int], inputs: LossInputs[Flat]) -> BySample:
    own, teacher = inputs.old_log_probs, inputs.teacher_log_probs
    assert own is not None and teacher is not None
    return {i: reverse_kl(own[i], teacher[i]) for i in samples}


def _without_critic(algorithm: Algorithm, rewards: Floats, kl: BySample) -> BySample:
    if algorithm.advantage_estimator == "reinforce_plus_plus":
        return {
            i: discounted_returns(float(rewards[i]), own, kl_coef=algorithm.kl_coef, gamma=algorithm.gamma)
            for i, own in kl.items()
        }
    counts = np.array([len(own) for own in kl.values()], np.int64)
    of_tokens = np.repeat(rewards[list(kl)].astype(np.float64), counts)
    advantages = with_kl_penalty(of_tokens, joined([*kl.values()], np.float32), kl_coef=algorithm.kl_coef)
    return dict(zip(kl, split_rows(advantages, counts), strict=True))


def _with_critic(
    algorithm: Algorithm, share: RankShare, inputs: LossInputs[Flat], kl: BySample
) -> tuple[BySample, BySample]:
    samples, rewards, values = share.samples, share.batch.train_rewards, inputs.old_values
    assert values is not None
    own, returns = generalized_advantages(
        [token_rewards(float(rewards[i]), kl[i], kl_coef=algorithm.kl_coef) for i in samples],
        [values[i] for i in samples],
        gamma=algorithm.gamma,
        lambd=algorithm.lambd,
    )
    return dict(zip(samples, own, strict=True)), dict(zip(samples, returns, strict=True))


def _kl(algorithm: Algorithm, share: RankShare, inputs: LossInputs[Flat]) -> BySample:
    """KL to the reference of each token, per sample; zeros without --kl-coef."""
    if not algorithm.kl_coef:
        counts = [share.trainable.count(i) for i in share.samples]
        return dict(zip(share.samples, split_rows(np.zeros(sum(counts), np.float32), counts), strict=True))
    own, reference = inputs.old_log_probs, inputs.ref_log_probs
    assert own is not None and reference is not None
    return {
        i: approximate_kl(
            torch.from_numpy(own[i]), torch.from_numpy(reference[i]), algorithm.kl_loss_type
        ).numpy()
        for i in share.samples
    }


def _custom(
    config: Config, share: RankShare, inputs: LossInputs[Flat], kl: BySample
) -> tuple[BySample, BySample | None]:
    """Call --custom-advantage-function-path; returns advantages, and returns if there is a critic to learn them."""
    path = config.functions.custom_advantage_function_path
    data = RolloutData(share, inputs, kl)
    load_function(path, flag="--custom-advantage-function-path")(config.namespace, data.lists)
    returns = data.taken(path, "returns") if inputs.old_values is not None else None
    return data.taken(path, "advantages"), returns


def entropy_metrics(share: RankShare, inputs: LossInputs[Flat]) -> dict[str, float]:
    """`rollout/entropy` and `rollout/ref_entropy`: the means over all tokens of the rollout that are trained on."""
    metrics = {}
    for name, values in (("entropy", inputs.entropy), ("ref_entropy", inputs.ref_entropy)):
        if values is not None:
            own = [values[i] for i in share.samples]
            total = np.array([sum(float(each.sum()) for each in own), sum(map(len, own))])
            entropy, count = _sum_over_data_parallel_ranks(total)
            metrics[f"rollout/{name}"] = float(entropy / max(count, 1))
    return metrics


def _sum_over_data_parallel_ranks(array: NDArray[np.float64]) -> NDArray[np.float64]:
    tensor = torch.from_numpy(array).to(device())
    dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
    return tensor.cpu().numpy()
