"""KL estimators, the clipped policy loss and token weights against NumPy twins and known gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rltrain.algorithms.losses import KLLossType, approximate_kl, clipped_policy_loss
from rltrain.algorithms.reduce import token_weights

RNG = np.random.default_rng(0)
LOG_PROBS, OTHER, ADVANTAGES = -RNG.random(200) * 4, -RNG.random(200) * 4, RNG.normal(size=200)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
def test_kl_estimators(kind: KLLossType) -> None:
    delta = OTHER - LOG_PROBS
    expected = {
        "k1": -delta,
        "k2": delta**2 / 2,
        "k3": np.exp(delta) - 1 - delta,
        "low_var_kl": np.clip(np.exp(delta) - 1 - delta, -10, 10),
    }[kind]
    result = approximate_kl(torch.from_numpy(LOG_PROBS), torch.from_numpy(OTHER), kind)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_k1_and_k3_estimate_the_divergence() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    exact = np.sum(p * np.log(p / q))
    for kind in ("k1", "k3"):
        estimate = approximate_kl(torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q)), kind)
        assert np.isclose(np.sum(p * estimate.numpy()), exact)  # the expectation under p, exactly


def test_low_var_kl_bounds_an_outlier_and_its_gradient() -> None:
    log_probs = torch.tensor([-30.0], requires_grad=True)
    approximate_kl(log_probs, torch.tensor([0.0]), "low_var_kl").sum().backward()
    assert log_probs.grad is not None and log_probs.grad.item() == 0.0


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match="k9"):
        approximate_kl(torch.zeros(1), torch.zeros(1), "k9")  # type: ignore[arg-type]


def policy_twin(lp: np.ndarray, old: np.ndarray, adv: np.ndarray, low: float, high: float, c: float | None):  # type: ignore[no-untyped-def]
    losses = []
    for x, y, a in zip(lp, old, adv, strict=True):
        ratio = np.exp(x - y)
        loss = max(-a * ratio, -a * min(max(ratio, 1 - low), 1 + high))
        losses.append(min(loss, -a * c) if c is not None and a < 0 else loss)
    return np.array(losses)


@pytest.mark.parametrize(("low", "high", "c"), [(0.2, 0.2, None), (0.2, 0.28, None), (0.1, 0.3, 3.0)])
def test_policy_loss(low: float, high: float, c: float | None) -> None:
    log_probs = torch.from_numpy(LOG_PROBS).requires_grad_()
    result = clipped_policy_loss(
        log_probs,
        torch.from_numpy(OTHER),
        torch.from_numpy(ADVANTAGES),
        eps_clip=low,
        eps_clip_high=high,
        eps_clip_c=c,
    )
    expected = policy_twin(LOG_PROBS, OTHER, ADVANTAGES, low, high, c)
    np.testing.assert_allclose(result.loss.detach(), expected, rtol=1e-12)
    result.loss.sum().backward()
    clipped = result.clipped.numpy().astype(bool)
    assert clipped.any() and not clipped.all()
    np.testing.assert_array_equal(log_probs.grad[clipped], 0.0)  # a clipped token has no gradient …
    free = -ADVANTAGES * np.exp(LOG_PROBS - OTHER)
    np.testing.assert_allclose(log_probs.grad[~clipped], free[~clipped], rtol=1e-12)  # … any other −A·r


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    log_probs = torch.from_numpy(LOG_PROBS).requires_grad_()
    advantages = torch.from_numpy(ADVANTAGES)
    clipped_policy_loss(
        log_probs, log_probs.detach(), advantages, eps_clip=0.2, eps_clip_high=0.2
    ).loss.sum().backward()
    np.testing.assert_allclose(log_probs.grad, -ADVANTAGES)


MASKS = st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=10)


@given(MASKS, st.booleans())
def test_token_weights_are_the_two_means(masks: list[list[int]], per_token: bool) -> None:
    arrays = [np.array(mask, dtype=np.int8) for mask in masks]
    values = [np.arange(len(mask)) + 3.0 * i for i, mask in enumerate(masks)]
    weights = token_weights(arrays, per_token=per_token)
    weighted = sum(w * v[m == 1].sum() for w, v, m in zip(weights, values, arrays, strict=True))
    kept = [v[m == 1] for v, m in zip(values, arrays, strict=True)]
    if per_token:
        expected = np.concatenate(kept).mean() if sum(map(len, kept)) else 0.0
    else:
        expected = np.mean([k.mean() if len(k) else 0.0 for k in kept])
    assert np.isclose(weighted, expected)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), max_size=6)), min_size=1, max_size=10)
)
def test_the_tokens_of_a_rollout_are_one_mean(samples: list[tuple[int, list[int]]]) -> None:
    """The weights of samples that share a rollout are those of their tokens in one sample."""
    rollouts, masks = [rollout for rollout, _ in samples], [np.array(mask, np.int8) for _, mask in samples]
    joined = {
        each: np.concatenate([m for r, m in zip(rollouts, masks, strict=True) if r == each])
        for each in rollouts
    }
    expected = dict(zip(joined, token_weights(list(joined.values()), per_token=False), strict=True))
    weights = token_weights(masks, per_token=False, rollout_ids=rollouts)
    assert np.allclose(weights, [expected[r] * m.any() for r, m in zip(rollouts, masks, strict=True)])
