"""How per-token losses become one number: as a weight for every token.

A weighted sum over tokens does not care in which order, micro-batch or rank the tokens are summed, so a loss
and its gradient do not depend on packing or on the number of ranks. Both common reductions are such sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the rollout side has no torch loaded
    from torch import Tensor

DR_GRPO_LENGTH = 1000


def token_weights(
    loss_masks: Sequence[NDArray[np.integer]],
    *,
    per_token: bool,
    rollout_ids: Sequence[int] | NDArray[np.integer] | None = None,
) -> NDArray[np.float64]:
    """The weight of a trainable token of each sample of one optimizer step.

    Args:
        loss_masks: One mask a sample, [response_length] of 0 and 1.
        per_token: False: the mean over each rollout's tokens, then over all rollouts (GRPO). True: the mean
            over all tokens of the step, so that long responses weigh more (DAPO,
            https://arxiv.org/abs/2503.14476).
        rollout_ids: Samples that share one were one rollout, as in slime; None: every sample is its own.

    Returns:
        One weight a sample. A rollout without trainable tokens has weight 0 but, in the mean over rollouts,
        still counts as one.
    """
    tokens = np.array([np.count_nonzero(mask) for mask in loss_masks], dtype=np.int64)
    if per_token:
        return np.full(len(tokens), 1.0 / max(1, tokens.sum())) * (tokens > 0)
    ids = np.arange(len(tokens)) if rollout_ids is None else np.asarray(rollout_ids)
    _, rollout = np.unique(ids, return_inverse=True)
    of_rollout = np.bincount(rollout, weights=tokens)
    shares = np.divide(1.0 / len(of_rollout), of_rollout, out=np.zeros(len(of_rollout)), where=of_rollout > 0)
    return shares[rollout] * (tokens > 0)


def constant_length(
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    loss_masks: Sequence[Tensor],
    calculate_per_token_loss: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Dr. GRPO's reduction (https://arxiv.org/abs/2503.20783): every sample's sum over the same constant.

    For `--custom-pg-loss-reducer-function-path`. The constant is `DR_GRPO_LENGTH` tokens; it only scales the
    learning rate.
    """
    del total_lengths, response_lengths, calculate_per_token_loss
    lengths = [len(mask) for mask in loss_masks]

    def reduce(values: Tensor) -> Tensor:
        parts = zip(values.split_with_sizes(lengths), loss_masks, strict=True)
        return sum(((part * mask).sum() for part, mask in parts), values.new_zeros(())) / DR_GRPO_LENGTH

    return reduce
