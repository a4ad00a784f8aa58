"""The loss of one micro-batch, and the sums that its metrics are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rltrain.algorithms.losses import (
    PolicyLoss,
    approximate_kl,
    cispo_loss,
    clipped_policy_loss,
    off_policy_sequence_mask,
    sequence_log_ratio,
)
from rltrain.algorithms.mismatch import tis
from rltrain.arguments.config import Config
from rltrain.arguments.groups.algorithm import Algorithm
from rltrain.arguments.groups.functions import Functions
from rltrain.functions import load_function
from rltrain.megatron.training.micro_batch import LossInputs, Responses

Sums = dict[str, Tensor]  # scalars that add up over micro-batches and ranks; of `…_max` the largest counts

_COMPARED = "compared_tokens"


@dataclass(frozen=True)
class TokenLoss:
    """Per-token values over n trainable tokens."""

    loss: Tensor  # [n], carries gradients
    metrics: dict[str, Tensor]  # [n] each, detached
    pg_loss: Tensor | None = None  # [n]: left out of `loss`, because a custom function reduces it
    kept: Tensor | None = None  # [n]: 0 where a correction threw the token out


def micro_batch_loss(
    config: Config,
    log_probs: Tensor,
    entropy: Tensor,
    inputs: LossInputs[Tensor],
    responses: Responses,
) -> tuple[Tensor, Sums]:
    """The loss that `config.algorithm.loss_type` names, as this micro-batch's share of the optimizer step's loss.

    Args:
        log_probs: log π of the sampled tokens, [n].
        entropy: Entropy of the distribution at each token, [n].
        inputs: For a policy loss with `advantages`, and with the others where the flags need them.

    Returns:
        A scalar with gradients, and the sums for the metrics.
    """
    if config.algorithm.loss_type == "sft_loss":
        result = TokenLoss(-log_probs, {"loss": -log_probs.detach(), "entropy": entropy.detach()})
    else:
        result = policy_token_loss(config, log_probs, entropy, inputs, responses)
    generated = inputs.old_log_probs if config.algorithm.keep_old_actor else None
    sums = metric_sums(result.metrics, log_probs.detach() if generated is None else generated, inputs)
    loss = result.loss @ inputs.weights
    if result.pg_loss is not None:
        pg_loss = _custom_reduction(config.algorithm, config.functions, result, inputs, responses)
        loss = loss + pg_loss
        sums["pg_loss"] = pg_loss.detach()
        sums["loss"] = loss.detach()
    return loss, sums


def policy_token_loss(
    config: Config,
    log_probs: Tensor,
    entropy: Tensor,
    inputs: LossInputs[Tensor],
    responses: Responses,
) -> TokenLoss:
    """The policy loss of each token with its KL and entropy terms; arguments as for `micro_batch_loss`."""
    # With one optimizer step a rollout the policy that is trained is the one that sampled: its old log-probs
    # are the current ones, and a forward pass to compute them would only repeat this one.
    old_log_probs = log_probs.detach() if inputs.old_log_probs is None else inputs.old_log_probs
    assert inputs.advantages is not None
    policy, log_ratio = _policy_loss(config.algorithm, log_probs, old_log_probs, inputs.advantages, responses)
    kept = torch.ones_like(log_probs)
    extra: dict[str, Tensor] = {}
    pg_loss = policy.loss
    if config.algorithm.use_opsm:
        counts = responses.counts(log_probs.device)
        mask = off_policy_sequence_mask(
            log_probs.detach(), old_log_probs, inputs.advantages, counts, delta=config.algorithm.opsm_delta
        )
        pg_loss, extra["opsm_clipfrac"] = pg_loss * mask, 1 - mask
    if config.algorithm.use_tis or config.algorithm.get_mismatch_metrics:
        corrected, kept_by_tis, measured = _correct_mismatch(
            config, pg_loss, old_log_probs, inputs, responses
        )
        extra |= {**measured, "ois": log_ratio.exp()}
        if config.algorithm.use_tis:
            pg_loss, kept = corrected, kept_by_tis
    if inputs.opd_reverse_kl is not None:
        extra["opd_reverse_kl"] = inputs.opd_reverse_kl
    metrics = {
        "pg_loss": pg_loss * kept,
        "pg_clipfrac": policy.clipped * kept,
        "ppo_kl": -log_ratio * kept,
        "entropy": entropy * kept,
    }
    terms = torch.zeros_like(log_probs)
    if config.algorithm.entropy_coef:
        terms = terms - config.algorithm.entropy_coef * metrics["entropy"]
    if inputs.ref_log_probs is not None and config.algorithm.use_kl_loss:
        ratio = (log_probs - old_log_probs).exp() if config.algorithm.use_unbiased_kl else None
        kl = approximate_kl(log_probs, inputs.ref_log_probs, config.algorithm.kl_loss_type, ratio)
        metrics["kl_loss"] = kl * kept
        terms = terms + config.algorithm.kl_loss_coef * metrics["kl_loss"]
    loss = metrics["pg_loss"] + terms
    detached = {name: value.detach() for name, value in {"loss": loss, **metrics, **extra}.items()}
    if config.functions.custom_pg_loss_reducer_function_path:
        return TokenLoss(terms, detached, pg_loss=pg_loss, kept=kept)
    return TokenLoss(loss, detached)


def _policy_loss(
    algorithm: Algorithm,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    responses: Responses,
) -> tuple[PolicyLoss, Tensor]:
    """The estimator's loss, and the log-ratio that it is made of."""
    clip = {"eps_clip": algorithm.eps_clip, "eps_clip_high": algorithm.eps_clip_high}
    log_ratio = log_probs - old_log_probs
    if algorithm.advantage_estimator == "cispo":
        return cispo_loss(log_probs, old_log_probs, advantages, **clip), log_ratio
    if algorithm.advantage_estimator == "gspo":
        log_ratio = sequence_log_ratio(log_probs, old_log_probs, responses.counts(log_probs.device))
        loss = clipped_policy_loss(
            log_ratio, torch.zeros_like(log_ratio), advantages, eps_clip_c=algorithm.eps_clip_c, **clip
        )
        return loss, log_ratio
    return clipped_policy_loss(
        log_probs, old_log_probs, advantages, eps_clip_c=algorithm.eps_clip_c, **clip
    ), log_ratio


def _correct_mismatch(
    config: Config,
    pg_loss: Tensor,
    train_log_probs: Tensor,
    inputs: LossInputs[Tensor],
    responses: Responses,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss after --use-tis, which tokens it keeps (1 or 0), and the correction's metrics. All [n]."""
    assert inputs.rollout_log_probs is not None
    path = config.functions.custom_tis_function_path
    function = load_function(path, flag="--custom-tis-function-path") if path else tis
    corrected, masks, metrics = function(
        args=config.namespace,
        pg_loss=responses.expand(pg_loss),
        train_log_probs=responses.split(responses.expand(train_log_probs)),
        rollout_log_probs=responses.split(responses.expand(inputs.rollout_log_probs)),
        loss_masks=responses.loss_masks,
        total_lengths=responses.total_lengths,
        response_lengths=responses.response_lengths,
    )
    kept = torch.cat([pg_loss.new_zeros(0), *(mask.to(pg_loss.dtype) for mask in masks)])
    for name, tensor in {"pg_loss": corrected, "loss_masks": kept, **metrics}.items():
        if tensor.shape != (sum(responses.response_lengths),):
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}; expected one value for each of the"
                f" {sum(responses.response_lengths)} response tokens"
            )
    collapse = responses.collapse
    return collapse(corrected), collapse(kept), {name: collapse(value) for name, value in metrics.items()}


def _custom_reduction(
    algorithm: Algorithm,
    functions: Functions,
    result: TokenLoss,
    inputs: LossInputs[Tensor],
    responses: Responses,
) -> Tensor:
    """What --custom-pg-loss-reducer-function-path makes of the policy loss, over the step's samples or tokens."""
    assert result.pg_loss is not None and result.kept is not None and inputs.normalizer is not None
    if not len(result.pg_loss):
        return result.pg_loss.sum()
    path = functions.custom_pg_loss_reducer_function_path
    make_reducer = load_function(path, flag="--custom-pg-loss-reducer-function-path")
    masks = responses.split(responses.expand(result.kept))
    reduce = make_reducer(
        responses.total_lengths, responses.response_lengths, masks, algorithm.calculate_per_token_loss
    )
    reduced = reduce(responses.expand(result.pg_loss))
    if not isinstance(reduced, Tensor) or reduced.ndim:
        raise ValueError(f"{path}: its reducer returned {reduced!r}; expected a scalar tensor")
    return reduced * inputs.normalizer[0]


def metric_sums(metrics: dict[str, Tensor], log_probs: Tensor, inputs: LossInputs[Tensor]) -> Sums:
    """Σ weight·value of each metric, with the weights of the loss; and how far the engine's log-probs are off.

    Args:
        metrics: [n] each.
        log_probs: log π of what is compared with the engine, [n], detached.
        inputs: Of the same tokens.
    """
    sums = {name: value @ inputs.weights for name, value in metrics.items()}
    if inputs.compared_log_probs is not None:
        log_ratio = log_probs - inputs.compared_log_probs
        log_ratio = log_ratio[~log_ratio.isnan()]
        difference = log_ratio.abs()
        sums["logprob_abs_diff"] = difference.sum()
        sums["logprob_k3"] = (torch.expm1(log_ratio) - log_ratio).sum()
        sums["logprob_abs_diff_max"] = torch.cat([difference, difference.new_zeros(1)]).max()
        sums[_COMPARED] = torch.ones_like(difference).sum()
    return sums


def add_up(parts: list[Sums]) -> Sums:
    """The sums of several micro-batches, all with the same names, merged into one; empty if there are no parts."""
    if not parts:
        return {}
    joined = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: all_.max() if name.endswith("_max") else all_.sum() for name, all_ in joined.items()}


def step_metrics(steps: list[Sums], group: dist.ProcessGroup) -> dict[str, float]:
    """Metrics of a rollout from this rank's sums of each of its optimizer steps.

    Returns:
        Means over the steps, the same on every rank of `group`; the comparison with the engine's log-probs is
        over the tokens that were compared. Empty without steps.
    """
    if not steps:
        return {}
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
    if compared:
        metrics["logprob_abs_diff"] /= compared
        metrics["logprob_k3"] /= compared
    else:
        metrics = {name: value for name, value in metrics.items() if not name.startswith("logprob_")}
    return metrics
