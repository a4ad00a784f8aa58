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


def approximate_kl(log_probs: Tensor, ref_log_probs: Tensor, kl_loss_type: KLLossType) -> Tensor:
    """KL estimate of each token.

    Args:
        log_probs: log π of the sampled tokens, any shape; gradients flow through it.
        ref_log_probs: log π_ref of the same tokens, same shape.
        kl_loss_type: `k1` unbiased, may be negative; `k2` ½·delta²; `k3` unbiased and never negative (the
            term of GRPO, https://arxiv.org/abs/2402.03300 eq. 4); `low_var_kl` is k3 clamped to ±10.

    Raises:
        ValueError: unknown `kl_loss_type`.
    """
    delta = ref_log_probs - log_probs
    match kl_loss_type:
        case "k1":
            return -delta
        case "k2":
            return 0.5 * delta.square()
        case "k3":
            return torch.expm1(delta) - delta
        case "low_var_kl":
            return (torch.expm1(delta) - delta).clamp(-_LOW_VAR_LIMIT, _LOW_VAR_LIMIT)
    raise ValueError(f"unknown KL estimator {kl_loss_type!r}")
