"""GSPO, CISPO, unbiased KL and the reductions against NumPy twins, finite differences and their invariances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rltrain.algorithms.losses import (
    KLLossType,
    approximate_kl,
    cispo_loss,
    clipped_policy_loss,
    sequence_log_ratio,
)
from rltrain.algorithms.reduce import DR_GRPO_LENGTH, constant_length

RNG = np.random.default_rng(1)
COUNTS = [3, 0, 1, 6]
N = sum(COUNTS)
LOG_PROBS, OLD, REF = (torch.from_numpy(-RNG.random(N) * 2) for _ in range(3))
ADVANTAGES = torch.from_numpy(RNG.normal(size=N))


def check_gradient(function: Callable[[Tensor], Tensor], at: Tensor = LOG_PROBS) -> None:
    """Autograd against central finite differences."""
    point = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(point), point)
    step = 1e-6
    for i in range(len(at)):
        offset = torch.zeros_like(at)
        offset[i] = step
        numeric = (function(at + offset) - function(at - offset)) / (2 * step)
        assert gradient[i].item() == pytest.approx(float(numeric), abs=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
def test_kl_gradients_are_those_of_finite_differences(kind: KLLossType) -> None:
    check_gradient(lambda log_probs: approximate_kl(log_probs, REF, kind).sum())


@pytest.mark.parametrize("eps_clip_c", [None, 1.5])
def test_the_clipped_loss_has_the_gradient_of_finite_differences(eps_clip_c: float | None) -> None:
    def loss(log_probs: Tensor) -> Tensor:
        return clipped_policy_loss(
            log_probs, OLD, ADVANTAGES, eps_clip=0.2, eps_clip_high=0.28, eps_clip_c=eps_clip_c
        ).loss.sum()

    check_gradient(loss)


def test_gspo_ratio_is_the_geometric_mean_of_each_sequence() -> None:
    result = sequence_log_ratio(LOG_PROBS, OLD, torch.tensor(COUNTS)).numpy()
    difference, start = (LOG_PROBS - OLD).numpy(), 0
    for count in COUNTS:
        expected = np.exp(difference[start : start + count]).prod() ** (1 / count) if count else 1
        np.testing.assert_allclose(np.exp(result[start : start + count]), expected)
        start += count


def test_gspo_gradient_is_that_of_the_sequence_loss() -> None:
    counts = torch.tensor(COUNTS)

    def ours(log_probs: Tensor) -> Tensor:
        ratio = sequence_log_ratio(log_probs, OLD, counts)
        loss = clipped_policy_loss(
            ratio, torch.zeros_like(ratio), ADVANTAGES, eps_clip=0.1, eps_clip_high=0.1
        ).loss
        weights = torch.cat([torch.full((n,), 1 / n) for n in COUNTS if n]).double()
        return loss @ weights

    def paper(log_probs: Tensor) -> Tensor:
        total, start = torch.zeros((), dtype=torch.float64), 0
        for n in filter(None, COUNTS):
            piece = slice(start, start + n)
            s = (log_probs[piece] - OLD[piece]).mean().exp()
            a = ADVANTAGES[piece].mean()
            total = total - torch.minimum(s * a, s.clamp(0.9, 1.1) * a)
            start += n
        return total

    # One advantage a sequence, as all estimators give it.
    sequence = torch.repeat_interleave(torch.arange(len(COUNTS)), counts)
    ADVANTAGES.copy_(torch.from_numpy(RNG.normal(size=len(COUNTS)))[sequence])
    assert ours(LOG_PROBS).item() == pytest.approx(paper(LOG_PROBS).item())
    point = LOG_PROBS.clone().requires_grad_()
    torch.testing.assert_close(
        *(torch.autograd.grad(function(point), point)[0] for function in (ours, paper))
    )
    check_gradient(ours)


def test_cispo_is_its_formula_and_keeps_every_gradient() -> None:
    log_probs = LOG_PROBS.clone().requires_grad_()
    result = cispo_loss(log_probs, OLD, ADVANTAGES, eps_clip=0.2, eps_clip_high=0.3)
    ratio = np.clip(np.exp((LOG_PROBS - OLD).numpy()), 0.8, 1.3)
    expected = -ratio * ADVANTAGES.numpy() * LOG_PROBS.numpy()
    np.testing.assert_allclose(result.loss.detach(), expected)
    (gradient,) = torch.autograd.grad(result.loss.sum(), log_probs)
    np.testing.assert_allclose(gradient, -ratio * ADVANTAGES.numpy())  # sg: only log π is differentiated
    clipped = result.clipped.numpy()
    assert 0 < clipped.sum() < N


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_unbiased_kl_weighs_with_the_ratio(kind: KLLossType) -> None:
    def weighted(log_probs: Tensor) -> Tensor:
        return approximate_kl(log_probs, REF, kind, (log_probs - OLD).exp()).sum()

    delta = (REF - LOG_PROBS).numpy()
    plain = {"k1": -delta, "k2": delta**2 / 2, "k3": np.exp(delta) - 1 - delta}[kind]
    expected = (np.exp((LOG_PROBS - OLD).numpy()) * plain).sum()
    assert weighted(LOG_PROBS).item() == pytest.approx(expected)
    check_gradient(weighted)


def test_unbiased_k1_has_the_gradient_of_the_exact_divergence() -> None:
    """Over a whole distribution, sampled by π_old: Σ π_old · estimate is KL(π ‖ π_ref), and so its gradient."""
    old, ref = (torch.from_numpy(RNG.dirichlet(np.ones(5))).log() for _ in range(2))
    logits = torch.from_numpy(RNG.normal(size=5)).requires_grad_()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits)[0]

    log_probs = logits.log_softmax(0)
    exact = gradient((log_probs.exp() * (log_probs - ref)).sum())
    log_probs = logits.log_softmax(0)
    for kind in ("k1", "k3"):
        estimate = approximate_kl(log_probs, ref, kind, (log_probs - old).exp())
        torch.testing.assert_close(gradient((old.exp() * estimate).sum()), exact)
        log_probs = logits.log_softmax(0)


def test_dr_grpo_divides_every_sample_by_the_same_length() -> None:
    masks = [torch.tensor([1.0, 0.0]), torch.ones(3)]
    values = torch.arange(1.0, 6.0, requires_grad=True)
    reduced = constant_length([4, 5], [2, 3], masks)(values)
    assert reduced.item() == pytest.approx((1 + 3 + 4 + 5) / DR_GRPO_LENGTH)
    reduced.backward()
    np.testing.assert_allclose(values.grad, np.array([1, 0, 1, 1, 1]) / DR_GRPO_LENGTH)
