"""Per-token estimators of the KL divergence from a reference policy, from log-probs of sampled tokens.

J. Schulman, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html): samples come from the
policy, `delta = log π_ref − log π`; all three have expectation KL(π ‖ π_ref) or, for k2, come close to it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLLossType = Literal["k1", "k2", "k3", "low_var_kl"]

_LOW_VAR_LIMIT = 10.0  # slime's bound for low_var_kl: one token must not dominate the loss


def approximate_kl(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    kl_loss_type: KLLossType,
    importance_ratio: Tensor | None = None,
) -> Tensor:
    """KL estimate of each token.

    Args:
        log_probs: log π of the sampled tokens, any shape; gradients flow through it.
        ref_log_probs: log π_ref of the same tokens, same shape.
        kl_loss_type: `k1` unbiased, may be negative; `k2` ½·delta²; `k3` unbiased and never negative (the
            term of GRPO, https://arxiv.org/abs/2402.03300 eq. 4); `low_var_kl` is k3 clamped to ±10.
        importance_ratio: π / π_old, same shape, with its gradient: weighs the estimate, which makes it and its
            gradient unbiased for tokens that π_old sampled (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556).

    Raises:
        ValueError: unknown `kl_loss_type`.
    """
    delta = ref_log_probs - log_probs
    match kl_loss_type:
        case "k1":
            kl = -delta
        case "k2":
            kl = 0.5 * delta.square()
        case "k3" | "low_var_kl":
            kl = torch.expm1(delta) - delta
        case _:
            raise ValueError(f"unknown KL estimator {kl_loss_type!r}")
    if importance_ratio is not None:
        kl = importance_ratio * kl
    return kl.clamp(-_LOW_VAR_LIMIT, _LOW_VAR_LIMIT) if kl_loss_type == "low_var_kl" else kl
