"""Log-probs and entropy of sampled tokens from logits whose vocabulary is split over tensor parallel ranks.

Rows are worked on in chunks, and the backward pass computes the softmax again. So beside the logits, in their own type,
nothing of their size is kept: the forward pass takes the room of one chunk, the backward pass that and the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rltrain.arguments.groups.training import LOGITS_WORKSPACE, logits_rows

# On a CPU a chunk stays in the cache between the operations on it.
_CPU_WORKSPACE = 2**21
# So many logits on a CPU have their exponentials kept: little memory, and small models train faster.
_KEPT = 2**23
_NOTHING = -1e30  # the largest logit where a rank has none; a finite number, so that nothing becomes NaN


class _VocabParallel(torch.autograd.Function):
    """Softmax statistics of rows of logits; keeps the logits and a few numbers a row.

    z is a logit less the largest of its row on this rank, over the temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup | None,
        first: int,
        columns: int,
        temperature: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        local = targets - first
        mine = (local >= 0) & (local < columns)
        index = torch.where(mine, local, 0).unsqueeze(-1)
        largest = logits.new_full((len(targets),), _NOTHING, dtype=torch.float32)
        sums = largest.new_zeros(3, len(targets))  # Σ exp z, Σ z·exp z and z of the target
        kept = largest.new_empty(logits.shape) if logits.is_cpu and logits.numel() <= _KEPT else None
        for part in _parts(len(targets) if columns else 0, rows):
            chunk = logits[part, :columns]
            largest[part] = chunk.amax(dim=-1)
            z = _shifted(chunk, largest[part], temperature)
            sums[2, part] = z.gather(-1, index[part]).squeeze(-1)
            exp = torch.exp(z, out=None if kept is None else kept[part, :columns])
            torch.sum(exp, dim=-1, out=sums[0, part])
            sums[1, part] = torch.bmm(exp.unsqueeze(1), z.unsqueeze(2)).flatten()
            del z, exp  # before the next two are made
        down = _add_up(sums, largest, mine, temperature, group)
        normalizer, weighted, target_logit = sums
        log_normalizer = normalizer.log()
        entropy = log_normalizer - weighted / normalizer
        scale, plus = down.exp() / normalizer, down - log_normalizer + entropy
        ctx.save_for_backward(logits, index, mine, largest, scale, plus, kept)
        ctx.columns, ctx.temperature, ctx.rows = columns, temperature, rows
        return target_logit - log_normalizer, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 7
        logits, index, mine, largest, scale, plus, kept = ctx.saved_tensors
        temperature, columns = ctx.temperature, ctx.columns
        # d log p_target / dz = onehot − p;  dH / dz = −p (log p + H);  p = exp z · scale, log p + H = z + plus
        factor = -scale / temperature
        constant = torch.zeros_like(plus) if grad_entropy is None else plus * grad_entropy
        constant = constant if grad_log_probs is None else constant + grad_log_probs
        gradient = torch.empty_like(logits)
        gradient[:, columns:] = 0  # columns that pad the vocabulary
        for part in _parts(len(logits) if columns else 0, ctx.rows):
            own = gradient[part, :columns]
            out = own if own.dtype == torch.float32 else None
            if grad_entropy is None and kept is not None:
                z = torch.mul(kept[part, :columns], (constant * factor)[part].unsqueeze(-1), out=out)
            elif grad_entropy is None:
                z = _shifted(logits[part, :columns], largest[part], temperature, out)
                z.exp_().mul_((constant * factor)[part].unsqueeze(-1))
            else:
                z = _shifted(logits[part, :columns], largest[part], temperature, out)
                exp = z.exp() if kept is None else kept[part, :columns]
                z.mul_(grad_entropy[part].unsqueeze(-1)).add_(constant[part].unsqueeze(-1))
                z.mul_(exp).mul_(factor[part].unsqueeze(-1))
                del exp
            if grad_log_probs is not None:
                of_target = torch.where(mine[part], grad_log_probs[part] / temperature, 0.0)
                z.scatter_add_(-1, index[part], of_target.unsqueeze(-1))
            if out is None:
                own.copy_(z)
            del z
        return gradient, None, None, None, None, None, None


def log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_size: int = -1,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) of the targets, and the distributions' entropy, in fp32.

    Args:
        logits: This rank's columns for n positions, [n, padded vocabulary / ranks], any float type. They must not
            be changed before the backward pass.
        targets: Token ids over the whole vocabulary, [n].
        vocab_size: Columns that exist; the ones that only pad the vocabulary have no probability.
        group: The tensor parallel ranks; None when the vocabulary is not split.
        chunk_size: Rows that are worked on at a time; -1 for as many as is best here. Results do not depend on it.

    Returns:
        Log-probs [n] in nats and entropies [n] in nats. Both carry gradients, and using only one costs only
        that one's backward pass.
    """
    rank = dist.get_rank(group) if group is not None else 0
    width = logits.shape[-1]
    first = rank * width
    columns = width if vocab_size is None else min(width, max(0, vocab_size - first))
    rows = logits_rows(chunk_size, width, _CPU_WORKSPACE if logits.is_cpu else LOGITS_WORKSPACE)
    log_probs, entropy = _VocabParallel.apply(logits, targets, group, first, columns, temperature, rows)
    return log_probs, entropy


def _parts(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _shifted(logits: Tensor, largest: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """(logits − largest) / temperature in fp32, in `out` if that is fp32, else in memory of its own."""
    out = out if out is not None and out.dtype == torch.float32 else None
    z = torch.sub(logits, largest.unsqueeze(-1), out=out)
    return z if temperature == 1.0 else z.div_(temperature)


def _add_up(
    sums: Tensor, largest: Tensor, mine: Tensor, temperature: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Make `sums` those of all ranks, each with z less the largest z of all ranks.

    Args:
        largest: This rank's largest logits.
        mine: Whether the target is among this rank's columns.

    Returns:
        What has to be added to this rank's z for that: 0 or less.
    """
    if group is None or group.size() == 1:
        return torch.zeros_like(largest)
    of_all = largest.clone()
    dist.all_reduce(of_all, op=dist.ReduceOp.MAX, group=group)
    down = (largest - of_all) / temperature
    sums[1] = down.exp() * (sums[1] + down * sums[0])
    sums[0] *= down.exp()
    sums[2] = torch.where(mine, sums[2] + down, 0.0)
    dist.all_reduce(sums, group=group)
    return down
