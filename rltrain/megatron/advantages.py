"""The advantage of every token that this rank trains on, from rewards and log-probs."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from rltrain.algorithms.advantages import discounted_returns, whiten, with_kl_penalty
from rltrain.algorithms.kl import approximate_kl
from rltrain.data.batch import TrainBatch
from rltrain.data.trainable import Flat, TrainableTokens
from rltrain.functions import load_function
from rltrain.megatron.device import device
from rltrain.megatron.responses import Responses


def advantages(
    args: argparse.Namespace,
    batch: TrainBatch,
    trainable: TrainableTokens,
    samples: list[int],
    values: dict[str, Flat],
    group: dist.ProcessGroup,
) -> Flat:
    """What --advantage-estimator makes of `batch.train_rewards`, and whitened with --normalize-advantages.

    Args:
        samples: This rank's samples; the entries of others may be empty.
        values: `old_log_probs` and `ref_log_probs`, where there is a KL penalty.
        group: The ranks that share the rollout, for whitening.

    Raises:
        ValueError: a sample of this rank has no reward, or a custom function returned something else.
    """
    missing = [i for i in range(len(batch)) if trainable.count(i) and np.isnan(batch.train_rewards[i])]
    if missing:
        raise ValueError(f"samples {missing} have no reward (or NaN) but are trained on")
    kl = _kl(args, trainable, samples, values)
    if args.custom_advantage_function_path:
        result = _custom(args, batch, samples, values, kl)
    elif args.advantage_estimator == "reinforce_plus_plus":
        result = {
            i: discounted_returns(
                float(batch.train_rewards[i]), kl[i], kl_coef=args.kl_coef, gamma=args.gamma
            )
            for i in samples
        }
    else:
        result = {
            i: with_kl_penalty(float(batch.train_rewards[i]), kl[i], kl_coef=args.kl_coef) for i in samples
        }
    if args.normalize_advantages:
        whitened = whiten([result[i] for i in samples], lambda array: _all_reduce(array, group))
        result = dict(zip(samples, whitened, strict=True))
    empty = np.empty(0, np.float32)
    return [result.get(i, empty) for i in range(len(batch))]


def _kl(
    args: argparse.Namespace, trainable: TrainableTokens, samples: list[int], values: dict[str, Flat]
) -> dict[int, NDArray[np.float32]]:
    """KL to the reference of each token, per sample; zeros without --kl-coef."""
    if not args.kl_coef:
        return {i: np.zeros(trainable.count(i), np.float32) for i in samples}
    return {
        i: approximate_kl(
            torch.from_numpy(values["old_log_probs"][i]),
            torch.from_numpy(values["ref_log_probs"][i]),
            args.kl_loss_type,
        ).numpy()
        for i in samples
    }


def _custom(
    args: argparse.Namespace,
    batch: TrainBatch,
    samples: list[int],
    values: dict[str, Flat],
    kl: dict[int, NDArray[np.float32]],
) -> dict[int, NDArray[np.float32]]:
    """Call --custom-advantage-function-path with slime's `rollout_data`: lists, one tensor a response."""
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
                         ("rollout_log_probs", "rollout_log_probs")):  # fmt: skip
        if ours in values:
            data[slimes] = [responses[i].expand(torch.from_numpy(values[ours][i])) for i in samples]
    load_function(path, flag="--custom-advantage-function-path")(args, data)
    given = data.get("advantages")
    if not isinstance(given, list) or len(given) != len(samples):
        raise ValueError(
            f"{path} must set rollout_data['advantages'] to a list of {len(samples)} tensors, one a sample"
        )
    result = {}
    for i, tensor in zip(samples, given, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.shape != (batch.response_lengths[i],):
            raise ValueError(
                f"{path}: the advantages of sample {i} must be a tensor of its"
                f" {batch.response_lengths[i]} response tokens"
            )
        result[i] = responses[i].collapse(tensor.detach().float()).numpy()
        if not np.isfinite(result[i]).all():
            raise ValueError(f"{path}: an advantage of sample {i} is not finite")
    return result


def _all_reduce(array: NDArray[np.float64], group: dist.ProcessGroup) -> NDArray[np.float64]:
    tensor = torch.from_numpy(array).to(device())
    dist.all_reduce(tensor, group=group)
    return tensor.cpu().numpy()
