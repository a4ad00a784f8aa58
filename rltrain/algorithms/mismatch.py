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
    """Importance weights as `--custom-config-path` describes them.

    `tis_level` (token, sequence, geometric; default token), `tis_mode` (truncate: only from above, clip: from
    both sides, mask: 0 outside; default truncate), and `tis_veto_threshold`: a response with a token whose
    ratio is below it is not trained on at all. The bounds are --tis-clip-low and --tis-clip.
    """
    ratio = importance_ratio(
        train_log_probs, rollout_log_probs, loss_masks, getattr(args, "tis_level", "token")
    )
    weight = bounded(ratio, getattr(args, "tis_mode", "truncate"), args.tis_clip_low, args.tis_clip)
    metrics = _metrics(ratio, weight)
    threshold = getattr(args, "tis_veto_threshold", None)
    if threshold is not None:
        kept = veto(train_log_probs, rollout_log_probs, loss_masks, threshold)
        vetoed = [(1 - keep).expand(len(mask)) for keep, mask in zip(kept, loss_masks, strict=True)]
        metrics["tis_veto"] = torch.cat(vetoed).to(pg_loss.dtype)
        loss_masks = [mask * keep.to(mask.dtype) for mask, keep in zip(loss_masks, kept, strict=True)]
    return pg_loss * weight, loss_masks, metrics


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
