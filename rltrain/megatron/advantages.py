"""The advantage of every token that this rank trains on, from rewards, log-probs and values."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from rltrain.algorithms.advantages import discounted_returns, whiten, with_kl_penalty
from rltrain.algorithms.distillation import reverse_kl, with_distillation
from rltrain.algorithms.gae import generalized_advantages, token_rewards
from rltrain.algorithms.kl import approximate_kl
from rltrain.data.batch import TrainBatch
from rltrain.data.trainable import Flat
from rltrain.functions import load_function
from rltrain.megatron.device import device
from rltrain.megatron.rank_share import RankShare
from rltrain.megatron.responses import Responses

Floats = NDArray[np.float32]
BySample = dict[int, Floats]


def advantages(
    args: argparse.Namespace, share: RankShare, values: dict[str, Flat], group: dist.ProcessGroup
) -> dict[str, Flat]:
    """What --advantage-estimator makes of the rewards, and whitened with --normalize-advantages.

    Args:
        share: This rank's samples.
        values: `old_log_probs` and `ref_log_probs` where there is a KL penalty, `old_values` for PPO, and
            `teacher_log_probs` for distillation.
        group: The ranks that share the rollout out, for whitening.

    Returns:
        `advantages`; for PPO `returns`; for distillation `opd_reverse_kl`. Other ranks' samples are empty.

    Raises:
        ValueError: a sample that is trained on has no reward, or a custom function returned something else.
    """
    batch, samples = share.batch, share.samples
    missing = [i for i in range(len(batch)) if share.trainable.count(i) and np.isnan(batch.train_rewards[i])]
    if missing:
        raise ValueError(f"samples {missing} have no reward (or NaN) but are trained on")
    kl = _kl(args, share, values)
    returns: BySample | None = None
    if args.custom_advantage_function_path:
        result, returns = _custom(args, batch, samples, values, kl)
    elif args.advantage_estimator == "ppo":
        result, returns = _with_critic(args, share, values, kl)
    else:
        result = {i: _without_critic(args, float(batch.train_rewards[i]), kl[i]) for i in samples}
    found = {} if returns is None else {"returns": returns}
    if args.use_opd:
        found["opd_reverse_kl"] = distances = {
            i: reverse_kl(values["old_log_probs"][i], values["teacher_log_probs"][i]) for i in samples
        }
        result = {
            i: with_distillation(result[i], distances[i], opd_kl_coef=args.opd_kl_coef) for i in samples
        }
    if args.normalize_advantages:
        whitened = whiten([result[i] for i in samples], lambda array: _all_reduce(array, group))
        result = dict(zip(samples, whitened, strict=True))
    found["advantages"] = result
    empty = np.empty(0, np.float32)
    return {name: [each.get(i, empty) for i in range(len(batch))] for name, each in found.items()}


def _without_critic(args: argparse.Namespace, reward: float, kl: Floats) -> Floats:
    if args.advantage_estimator == "reinforce_plus_plus":
        return discounted_returns(reward, kl, kl_coef=args.kl_coef, gamma=args.gamma)
    return with_kl_penalty(reward, kl, kl_coef=args.kl_coef)


def _with_critic(
    args: argparse.Namespace, share: RankShare, values: dict[str, Flat], kl: BySample
) -> tuple[BySample, BySample]:
    samples, rewards = share.samples, share.batch.train_rewards
    own, returns = generalized_advantages(
        [token_rewards(float(rewards[i]), kl[i], kl_coef=args.kl_coef) for i in samples],
        [values["old_values"][i] for i in samples],
        gamma=args.gamma,
        lambd=args.lambd,
    )
    return dict(zip(samples, own, strict=True)), dict(zip(samples, returns, strict=True))


def _kl(args: argparse.Namespace, share: RankShare, values: dict[str, Flat]) -> BySample:
    """KL to the reference of each token, per sample; zeros without --kl-coef."""
    if not args.kl_coef:
        return {i: np.zeros(share.trainable.count(i), np.float32) for i in share.samples}
    return {
        i: approximate_kl(
            torch.from_numpy(values["old_log_probs"][i]),
            torch.from_numpy(values["ref_log_probs"][i]),
            args.kl_loss_type,
        ).numpy()
        for i in share.samples
    }


def _custom(
    args: argparse.Namespace,
    batch: TrainBatch,
    samples: list[int],
    values: dict[str, Flat],
    kl: BySample,
) -> tuple[BySample, BySample | None]:
    """Call --custom-advantage-function-path with slime's `rollout_data`: lists, one tensor a response.

    Returns:
        Advantages; and returns, if there is a critic to learn them.
    """
    path = args.custom_advantage_function_path
    cpu = torch.device("cpu")
    responses = {i: Responses.of(batch, [i], cpu) for i in samples}
    data: dict[str, Any] = {
        "tokens": [torch.from_numpy(batch.tokens[i].astype(np.int64)) for i in samples],
        "rewards": [float(batch.train_rewards[i]) for i in samples],
        "response_lengths": [batch.response_lengths[i] for i in samples],
        "total_lengths": [len(batch.tokens[i]) for i in samples],
        "loss_masks": [responses[i].loss_masks[0] for i in samples],
        "kl": [responses[i].expand(torch.from_numpy(kl[i])) for i in samples],
    }
    for ours, slimes in (("old_log_probs", "log_probs"), ("ref_log_probs", "ref_log_probs"),
                         ("rollout_log_probs", "rollout_log_probs"), ("old_values", "values"),
                         ("teacher_log_probs", "teacher_log_probs")):  # fmt: skip
        if ours in values:
            data[slimes] = [responses[i].expand(torch.from_numpy(values[ours][i])) for i in samples]
    load_function(path, flag="--custom-advantage-function-path")(args, data)
    wanted = ["advantages", "returns"] if "old_values" in values else ["advantages"]
    found = [_given(path, data, name, batch, responses) for name in wanted]
    return found[0], found[1] if len(found) > 1 else None


def _given(
    path: str, data: dict[str, Any], name: str, batch: TrainBatch, responses: dict[int, Responses]
) -> BySample:
    """One of the lists that a custom function has set, over trainable tokens."""
    given = data.get(name)
    if not isinstance(given, list) or len(given) != len(responses):
        raise ValueError(
            f"{path} must set rollout_data[{name!r}] to a list of {len(responses)} tensors, one a sample"
        )
    result = {}
    for (i, response), tensor in zip(responses.items(), given, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.shape != (batch.response_lengths[i],):
            raise ValueError(
                f"{path}: the {name} of sample {i} must be a tensor of its"
                f" {batch.response_lengths[i]} response tokens"
            )
        result[i] = response.collapse(tensor.detach().float()).numpy()
        if not np.isfinite(result[i]).all():
            raise ValueError(f"{path}: one of the {name} of sample {i} is not finite")
    return result


def _all_reduce(array: NDArray[np.float64], group: dist.ProcessGroup) -> NDArray[np.float64]:
    tensor = torch.from_numpy(array).to(device())
    dist.all_reduce(tensor, group=group)
    return tensor.cpu().numpy()
