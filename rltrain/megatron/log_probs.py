"""Log-probs and entropy of sampled tokens from logits whose vocabulary is split over tensor parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _VocabParallel(torch.autograd.Function):
    """Softmax statistics of rows of logits; keeps the probabilities for the backward pass, nothing else."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None, first: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        largest = _all_reduce(logits.amax(dim=-1), dist.ReduceOp.MAX, group)
        shifted = logits - largest.unsqueeze(-1)
        local = targets - first
        mine = (local >= 0) & (local < logits.shape[-1])
        index = torch.where(mine, local, 0).unsqueeze(-1)
        target_logit = torch.where(mine, shifted.gather(-1, index).squeeze(-1), 0.0)
        probs = shifted.exp()
        # Three sums over the vocabulary in one message: Σ exp z, Σ z·exp z, z of the target.
        weighted = torch.bmm(probs.unsqueeze(1), shifted.unsqueeze(2)).flatten()
        sums = torch.stack([probs.sum(-1), weighted, target_logit])
        normalizer, weighted, target_logit = _all_reduce(sums, dist.ReduceOp.SUM, group)
        log_normalizer = normalizer.log()
        entropy = log_normalizer - weighted / normalizer
        probs.div_(normalizer.unsqueeze(-1))
        ctx.save_for_backward(probs, index, mine, entropy)
        return target_logit - log_normalizer, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        probs, index, mine, entropy = ctx.saved_tensors
        grad = None
        if grad_log_probs is not None:
            # d log p_target / dz = onehot − p
            grad = probs * -grad_log_probs.unsqueeze(-1)
            grad.scatter_add_(-1, index, torch.where(mine, grad_log_probs, 0.0).unsqueeze(-1))
        if grad_entropy is not None:
            # dH / dz = −p (log p + H); where p underflows to 0 so does p log p
            log_probs = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
            of_entropy = probs * (log_probs + entropy.unsqueeze(-1)) * -grad_entropy.unsqueeze(-1)
            grad = of_entropy if grad is None else grad + of_entropy
        return grad, None, None, None


def log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) of the targets, and the distributions' entropy, in fp32.

    Args:
        logits: This rank's columns for n positions, [n, padded vocabulary / ranks], any float type.
        targets: Token ids over the whole vocabulary, [n].
        vocab_size: Columns that exist; the ones that only pad the vocabulary have no probability.
        group: The tensor parallel ranks; None when the vocabulary is not split.

    Returns:
        Log-probs [n] in nats and entropies [n] in nats. Both carry gradients, and using only one costs only
        that one's backward pass.
    """
    rank = dist.get_rank(group) if group is not None else 0
    first = rank * logits.shape[-1]
    if vocab_size is not None and first + logits.shape[-1] > vocab_size:
        logits = logits[..., : max(0, vocab_size - first)]
    logits = logits.float() if temperature == 1.0 else logits.float() / temperature
    return _VocabParallel.apply(logits, targets, group, first)


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor
