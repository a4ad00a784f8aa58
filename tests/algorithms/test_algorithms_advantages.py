"""Advantages: group baselines, discounted returns, whitening, against plain loops and their algebra."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltrain.algorithms.estimators import discounted_returns, whiten, with_kl_penalty
from rltrain.algorithms.grpo import leave_one_out, normalize_rewards
from rltrain.arguments.config import Config
from rltrain.rollout.train_data.convert import train_rewards
from rltrain.sample import Sample

REWARDS = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=1, max_size=12)
# Groups of uneven size, of size one among them, in any order.
GROUPED = st.lists(st.tuples(st.integers(0, 3), st.integers(-8, 8)), min_size=1, max_size=16)


def same(array: np.ndarray) -> np.ndarray:
    return array


@given(GROUPED)
def test_leave_one_out_is_the_mean_of_the_others(pairs: list[tuple[int, int]]) -> None:
    groups, rewards = [g for g, _ in pairs], [float(r) for _, r in pairs]
    expected = []
    for i, (group, reward) in enumerate(zip(groups, rewards, strict=True)):
        others = [r for j, r in enumerate(rewards) if j != i and groups[j] == group]
        expected.append(reward - np.mean(others) if others else 0.0)
    np.testing.assert_allclose(leave_one_out(rewards, groups), expected, atol=1e-9)


@given(GROUPED, st.integers(-50, 50), st.sampled_from([0.5, 2.0, 7.0]), st.randoms())
def test_group_baselines_obey_their_laws(
    pairs: list[tuple[int, int]], shift: int, scale: float, random: object
) -> None:
    groups, rewards = [g for g, _ in pairs], [float(r) for _, r in pairs]
    order = list(range(len(pairs)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for function, homogeneous in (
        (leave_one_out, True),
        (lambda r, g: normalize_rewards(r, g, std=False), True),
        (normalize_rewards, False),
    ):
        base = np.array(function(rewards, groups))
        shifted = function([r + shift for r in rewards], groups)
        np.testing.assert_allclose(shifted, base, atol=1e-6)
        scaled = np.array(function([r * scale for r in rewards], groups))
        np.testing.assert_allclose(scaled, base * (scale if homogeneous else 1), atol=2e-5)
        permuted = function([rewards[i] for i in order], [groups[i] for i in order])
        np.testing.assert_allclose(permuted, base[order], atol=1e-9)
        for group in set(groups):
            assert abs(sum(base[[g == group for g in groups]])) < 1e-6


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("grpo", [1 / 2**0.5, 0, -1 / 2**0.5, 0, 0]),
        ("gspo", [1 / 2**0.5, 0, -1 / 2**0.5, 0, 0]),
        ("cispo", [1 / 2**0.5, 0, -1 / 2**0.5, 0, 0]),
        ("rloo", [2, 0, -2, 0, 0]),
        ("reinforce_plus_plus_baseline", [1, 0, -1, 0, 0]),
        ("reinforce_plus_plus", [2, 7, 0, 5, 0]),
    ],
)
def test_each_estimator_gets_its_baseline(estimator: str, expected: list[float]) -> None:
    # group a: 2 and 0 and one that failed, interleaved; group b: one alone
    args = Config().replace(
        advantage_estimator=estimator, rewards_normalization=True, grpo_std_normalization=True
    )
    samples = [Sample(group_index=group) for group in (1, 2, 1, 3, 1)]
    result = train_rewards(args.algorithm, samples, [2.0, 7.0, 0.0, 5.0, None])
    np.testing.assert_allclose(result, expected, atol=1e-5)
    args = args.replace(rewards_normalization=False)
    assert train_rewards(args.algorithm, samples, [2.0, 7.0, 0.0, 5.0, None]) == [2, 7, 0, 5, 0]


@given(GROUPED, st.data())
def test_a_rollout_counts_once_however_many_samples_it_has(
    grouped: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Samples that share a rollout and its reward get what the rollout alone would get."""
    copies = data.draw(st.lists(st.integers(1, 3), min_size=len(grouped), max_size=len(grouped)))
    rollouts = [i for i, n in enumerate(copies) for _ in range(n)]
    groups, rewards = [group for group, _ in grouped], [float(reward) for _, reward in grouped]
    for function in (normalize_rewards, leave_one_out):
        alone = function(rewards, groups)
        result = function([rewards[i] for i in rollouts], [groups[i] for i in rollouts], rollout_ids=rollouts)
        np.testing.assert_allclose(result, [alone[i] for i in rollouts], atol=1e-9)


def test_samples_of_a_rollout_may_have_rewards_of_their_own() -> None:
    # One rollout with rewards 4 and 0, its mean 2; another with 1: the mean of the two is 1.5.
    rewards, groups, rollouts = [4.0, 0.0, 1.0], [0, 0, 0], [7, 7, 8]
    assert normalize_rewards(rewards, groups, std=False, rollout_ids=rollouts) == [2.5, -1.5, -0.5]
    assert leave_one_out(rewards, groups, rollout_ids=rollouts) == [3.0, -1.0, -1.0]
    variance = (2.5**2 / 2 + 1.5**2 / 2 + 0.5**2) / (2 - 1)
    result = normalize_rewards(rewards, groups, rollout_ids=rollouts)
    np.testing.assert_allclose(result, np.array([2.5, -1.5, -0.5]) / (variance**0.5 + 1e-6))
    assert normalize_rewards([4.0, 0.0], [0, 0], rollout_ids=[7, 7]) == [0.0, 0.0]  # a group of one rollout


@given(REWARDS, st.floats(-5, 5), st.floats(0, 1), st.floats(0, 1))
def test_returns_are_the_discounted_sums(
    kl: list[float], reward: float, kl_coef: float, gamma: float
) -> None:
    array = np.array(kl, np.float32)
    rewards = [-kl_coef * float(x) for x in array]
    rewards[-1] += reward
    n = len(rewards)
    expected = [sum(gamma ** (k - t) * rewards[k] for k in range(t, n)) for t in range(n)]
    result = discounted_returns(reward, array, kl_coef=kl_coef, gamma=gamma)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)


def test_returns_of_nothing_and_the_penalty_without_discount() -> None:
    assert discounted_returns(1.0, np.zeros(0, np.float32), kl_coef=0.1, gamma=0.9).shape == (0,)
    kl = np.array([1.0, -2.0], np.float32)
    np.testing.assert_allclose(with_kl_penalty(3.0, kl, kl_coef=0.5), [2.5, 4.0])


@given(st.lists(REWARDS, min_size=1, max_size=5))
def test_whitening_is_that_of_all_tokens_together(samples: list[list[float]]) -> None:
    arrays = [np.array(each, np.float32) for each in samples]
    joined = np.concatenate(arrays).astype(np.float64)
    if len(joined) < 2:
        expected = np.zeros(len(joined))
    else:
        expected = (joined - joined.mean()) / np.sqrt(joined.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(np.concatenate(whiten(arrays, same)), expected, rtol=1e-4, atol=1e-4)


def test_whitening_keeps_its_digits_beside_a_large_mean() -> None:
    result = whiten([np.array([4096.0, 4096.5, 4097.0], np.float32)], same)[0]
    np.testing.assert_allclose(result, [-1, 0, 1], atol=1e-6)


def test_whitening_of_equal_values_is_zero() -> None:
    np.testing.assert_array_equal(whiten([np.full(4, 0.1, np.float32)], same)[0], 0.0)


def test_whitening_over_ranks_equals_one_rank() -> None:
    """Two ranks, one of them without any token, in lockstep through a shared sum."""
    rng = np.random.default_rng(0)
    everything = [rng.normal(3, 5, n).astype(np.float32) for n in (4, 1, 7)]
    single = whiten(everything, same)
    stages = [np.array([12.0, np.concatenate(everything).astype(float).sum()])]
    mean = stages[0][1] / 12
    stages.append(np.array([np.square(np.concatenate(everything).astype(float) - mean).sum()]))
    for share in (everything[:1], everything[1:], []):
        totals = iter(stages)
        result = whiten(share, lambda _, totals=totals: next(totals))  # type: ignore[misc]
        expected = single[:1] if share and len(share[0]) == 4 else single[1:] if share else []
        for ours, theirs in zip(result, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
