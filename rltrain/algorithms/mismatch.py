"""Corrections for engines whose log-probs are not quite the trainer's: importance weights on the policy loss.

All have slime's signature for `--custom-tis-function-path`. A response's tokens are one tensor of a list,
`pg_loss` is those of all responses one after the other; masks say which tokens are trained on.

TIS: https://fengyao.notion.site/off-policy-rl; icepop: https://arxiv.org/abs/2510.18855; sequence and geometric
weights, masking and the veto: https://richardli.xyz/rl-collapse.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

import torch
from torch import Tensor

Corrected = tuple[Tensor, list[Tensor], dict[str, Tensor]]
Level = Literal["token", "sequence", "geometric"]
Mode = Literal["truncate", "clip", "mask"]

_LOG_LIMIT = 20.0  # of a log-ratio before exp: a sequence's can overflow


def tis(
    args: argparse.Namespace,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **kwargs: Any,
) -> Corrected:
    """Truncated importance sampling: each token's ratio, clamped to [--tis-clip-low, --tis-clip], as weight."""
    ratio = importance_ratio(train_log_probs, rollout_log_probs, loss_masks, "token")
    weight = ratio.clamp(args.tis_clip_low, args.tis_clip)
    return pg_loss * weight, loss_masks, _metrics(ratio, weight)


def icepop(
    args: argparse.Namespace,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **kwargs: Any,
) -> Corrected:
    """Each token's ratio as weight; tokens with a ratio outside [--tis-clip-low, --tis-clip] get weight 0."""
    ratio = importance_ratio(train_log_probs, rollout_log_probs, loss_masks, "token")
    weight = bounded(ratio, "mask", args.tis_clip_low, args.tis_clip)
    return pg_loss * weight, loss_masks, _metrics(ratio, weight)


def mis(
    args: argparse.Namespace,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **kwargs: Any,
) -> Corrected:
    """Importance weights and rejection as `--custom-config-path` describes them, with slime's keys.

    Weights: `tis_level` (token, sequence, geometric; default token), `tis_mode` (truncate: only from above, clip: from
    both sides, mask: 0 outside; default truncate), `tis_upper_bound` (default: --tis-clip) and `tis_lower_bound`
    (default: --tis-clip-low; where only the upper one is given, 1 / `tis_upper_bound`). `tis_batch_normalize`: the
    weights are divided by their mean over the trained tokens of the micro-batch (level token) or over its responses.

    Rejection, with `use_rs`: tokens whose ratio of `rs_level` (default: that of the weights) is outside
    [`rs_lower_bound`, `rs_upper_bound`] (default: those of the weights) are not trained on. `rs_veto_threshold`, and
    without `use_rs` `tis_veto_threshold`: the same for a response with a token whose own ratio is below it.

    Raises:
        ValueError: a level or mode that does not exist, a lower bound that is not below the upper one, or
            `tis_batch_normalize` with the level geometric.
    """
    level: Level = getattr(args, "tis_level", "token")
    mode: Mode = getattr(args, "tis_mode", "truncate")
    usual = (args.tis_clip_low, args.tis_clip)
    low, high = _bounds(getattr(args, "tis_lower_bound", None), getattr(args, "tis_upper_bound", None), usual)
    ratio = importance_ratio(train_log_probs, rollout_log_probs, loss_masks, level)
    weight = bounded(ratio, mode, low, high)
    metrics = _metrics(ratio, weight)
    if getattr(args, "tis_batch_normalize", False):
        factor = _mean_weight(weight, loss_masks, level)
        weight, metrics["tis_batch_norm_factor"] = weight / factor, factor.expand_as(weight)
    threshold = getattr(args, "tis_veto_threshold", None)
    if getattr(args, "use_rs", False):
        threshold = getattr(args, "rs_veto_threshold", None)
        rs_level: Level = getattr(args, "rs_level", None) or level
        rejected = importance_ratio(train_log_probs, rollout_log_probs, loss_masks, rs_level)
        rs_low, rs_high = (
            own if (own := getattr(args, f"rs_{end}_bound", None)) is not None else usual
            for end, usual in (("lower", low), ("upper", high))
        )
        _check_bounds("rs", rs_low, rs_high)
        inside = (rejected >= rs_low) & (rejected <= rs_high)
        metrics["rs_low"], metrics["rs_high"] = (
            outside.to(pg_loss.dtype) for outside in (rejected < rs_low, rejected > rs_high)
        )
        parts = torch.split(inside, [len(mask) for mask in loss_masks])
        kept_masks = [mask * part.to(mask.dtype) for mask, part in zip(loss_masks, parts, strict=True)]
    else:
        kept_masks = loss_masks
    if threshold is not None:
        kept = veto(train_log_probs, rollout_log_probs, loss_masks, threshold)
        vetoed = [(1 - keep).expand(len(mask)) for keep, mask in zip(kept, loss_masks, strict=True)]
        metrics["tis_veto"] = torch.cat(vetoed).to(pg_loss.dtype)
        kept_masks = [mask * keep.to(mask.dtype) for mask, keep in zip(kept_masks, kept, strict=True)]
    return pg_loss * weight, kept_masks, metrics


def _bounds(low: float | None, high: float | None, usual: tuple[float, float]) -> tuple[float, float]:
    """The bounds of the weights: from slime's keys, or else from the flags."""
    if low is None:
        low = usual[0] if high is None else 1 / high
    high = usual[1] if high is None else high
    _check_bounds("tis", low, high)
    return low, high


def _check_bounds(name: str, low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"{name}_lower_bound {low} must be less than {name}_upper_bound {high}")


def _mean_weight(weight: Tensor, loss_masks: list[Tensor], level: Level) -> Tensor:
    """The mean weight of the trained tokens or, of the level sequence, of the responses that have any; 1 without."""
    if level == "geometric":
        raise ValueError("tis_batch_normalize needs tis_level token or sequence")
    shares = [mask if level == "token" else mask / mask.sum().clamp_min(1) for mask in loss_masks]
    share = torch.cat([weight.new_zeros(0), *(each.to(weight.dtype) for each in shares)])
    total = share.sum()
    return torch.where(total > 0, (weight * share).sum() / total.clamp_min(1e-8), 1.0).clamp_min(1e-8)


def importance_ratio(
    train_log_probs: list[Tensor], rollout_log_probs: list[Tensor], loss_masks: list[Tensor], level: Level
) -> Tensor:
    """π_train / π_rollout for every token, all responses one after the other.

    `token`: of the token. `sequence`: the product over the response's trained tokens. `geometric`: their
    geometric mean.

    Raises:
        ValueError: another `level`.
    """
    if level not in ("token", "sequence", "geometric"):
        raise ValueError(f"tis_level is {level!r}: it is token, sequence or geometric")
    parts = []
    for train, rollout, mask in zip(train_log_probs, rollout_log_probs, loss_masks, strict=True):
        difference = train - rollout
        if level != "token":
            total = (difference * mask).sum()
            total = total / mask.sum().clamp_min(1) if level == "geometric" else total
            difference = total.expand_as(difference)
        parts.append(difference.clamp(-_LOG_LIMIT, _LOG_LIMIT).exp())
    return torch.cat(parts) if parts else torch.zeros(0)


def bounded(ratio: Tensor, mode: Mode, low: float, high: float) -> Tensor:
    """The weight that a ratio becomes.

    Raises:
        ValueError: another `mode`.
    """
    match mode:
        case "truncate":
            return ratio.clamp(max=high)
        case "clip":
            return ratio.clamp(low, high)
        case "mask":
            return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    raise ValueError(f"tis_mode is {mode!r}: it is truncate, clip or mask")


def veto(
    train_log_probs: list[Tensor], rollout_log_probs: list[Tensor], loss_masks: list[Tensor], threshold: float
) -> list[Tensor]:
    """One scalar a response: 0 where a trained token's ratio is below `threshold`, else 1."""
    kept = []
    for train, rollout, mask in zip(train_log_probs, rollout_log_probs, loss_masks, strict=True):
        ratio = (train - rollout).exp()
        kept.append(1 - ((ratio < threshold) & (mask > 0)).any().to(train.dtype))
    return kept


def _metrics(ratio: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return {
        "tis": ratio.detach(),
        "tis_abs": (ratio - 1).abs().detach(),
        "tis_clipfrac": (weight != ratio).to(ratio.dtype),
    }
