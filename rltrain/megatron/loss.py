"""The loss of one micro-batch, and the sums that its metrics are made of."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rltrain.algorithms.kl import approximate_kl
from rltrain.algorithms.policy import clipped_policy_loss

Sums = dict[str, Tensor]  # scalars that add up over micro-batches and ranks; of `…_max` the largest counts

_COMPARED = "compared_tokens"


@dataclass(frozen=True)
class TokenLoss:
    """Per-token values over n trainable tokens."""

    loss: Tensor  # [n], carries gradients
    metrics: dict[str, Tensor]  # [n] each, detached


def token_loss(
    args: argparse.Namespace, log_probs: Tensor, entropy: Tensor, values: dict[str, Tensor]
) -> TokenLoss:
    """The loss that `args.loss_type` names.

    Args:
        log_probs: log π of the sampled tokens, [n].
        entropy: Entropy of the distribution at each token, [n].
        values: `advantages`; and where they apply `old_log_probs`, `ref_log_probs`. All [n].
    """
    if args.loss_type == "sft_loss":
        return TokenLoss(-log_probs, {"loss": -log_probs.detach(), "entropy": entropy.detach()})
    # With one optimizer step a rollout the policy that is trained is the one that sampled: its old log-probs
    # are the current ones, and a forward pass to compute them would only repeat this one.
    old_log_probs = values.get("old_log_probs", log_probs.detach())
    policy = clipped_policy_loss(
        log_probs,
        old_log_probs,
        values["advantages"],
        eps_clip=args.eps_clip,
        eps_clip_high=args.eps_clip_high,
        eps_clip_c=args.eps_clip_c,
    )
    loss = policy.loss
    metrics = {
        "pg_loss": policy.loss,
        "pg_clipfrac": policy.clipped,
        "ppo_kl": old_log_probs - log_probs,
        "entropy": entropy,
    }
    if args.entropy_coef:
        loss = loss - args.entropy_coef * entropy
    if "ref_log_probs" in values:
        metrics["kl_loss"] = approximate_kl(log_probs, values["ref_log_probs"], args.kl_loss_type)
        loss = loss + args.kl_loss_coef * metrics["kl_loss"]
    return TokenLoss(loss, {name: value.detach() for name, value in {"loss": loss, **metrics}.items()})


def metric_sums(metrics: dict[str, Tensor], log_probs: Tensor, values: dict[str, Tensor]) -> Sums:
    """Σ weight·value of each metric, with the weights of the loss; and how far the engine's log-probs are off.

    Args:
        metrics: [n] each.
        log_probs: log π, [n], detached.
        values: `weights`, and `rollout_log_probs` where they are to be compared. Both [n].
    """
    sums = {name: value @ values["weights"] for name, value in metrics.items()}
    if "rollout_log_probs" in values:
        difference = (log_probs - values["rollout_log_probs"]).abs()
        sums["logprob_abs_diff"] = difference.sum()
        sums["logprob_abs_diff_max"] = torch.cat([difference, difference.new_zeros(1)]).max()
        sums[_COMPARED] = torch.ones_like(difference).sum()
    return sums


def add_up(parts: list[Sums]) -> Sums:
    """The sums of several micro-batches, all with the same names, as one."""
    joined = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: all_.max() if name.endswith("_max") else all_.sum() for name, all_ in joined.items()}


def step_metrics(steps: list[Sums], group: dist.ProcessGroup) -> dict[str, float]:
    """Metrics of a rollout from this rank's sums of each of its optimizer steps.

    Returns:
        Means over the steps, the same on every rank of `group`; the comparison with the engine's log-probs is
        over the tokens that were compared.
    """
    sums = torch.stack([value for step in steps for name, value in step.items()])
    largest = sums.clone()
    dist.all_reduce(sums, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    totals: dict[str, list[float]] = {}
    names = [name for step in steps for name in step]
    for name, total, most in zip(names, sums.tolist(), largest.tolist(), strict=True):
        totals.setdefault(name, []).append(most if name.endswith("_max") else total)
    compared = sum(totals.pop(_COMPARED, []))
    metrics = {name: sum(values) / len(values) for name, values in totals.items()}
    if "logprob_abs_diff" in metrics:
        metrics["logprob_abs_diff"] /= max(1.0, compared)
    return metrics
