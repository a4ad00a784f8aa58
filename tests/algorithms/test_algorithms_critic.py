"""GAE, the value loss, distillation and sequence masking against plain loops, and the laws that they obey."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rltrain.algorithms.estimators import (
    discounted_returns,
    generalized_advantages,
    reverse_kl,
    token_rewards,
    whiten,
    with_distillation,
)
from rltrain.algorithms.losses import clipped_value_loss, explained_variance, off_policy_sequence_mask

NUMBERS = st.floats(-4, 4, width=32).map(lambda x: round(x, 2))
RESPONSE = st.integers(0, 6).flatmap(lambda n: hnp.arrays(np.float32, (2, n), elements=NUMBERS))
RESPONSES = st.lists(RESPONSE, min_size=1, max_size=5)
DISCOUNT = st.sampled_from([0.0, 0.5, 0.9, 1.0])


def plain_gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lambd: float) -> list[float]:
    """The definition: an exponentially weighted sum of the following temporal differences."""
    n = len(rewards)
    after = [*values[1:], 0.0] if n else []
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lambd) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


@given(RESPONSES, DISCOUNT, DISCOUNT)
def test_gae_is_its_definition_for_any_mix_of_lengths(
    responses: list[np.ndarray], gamma: float, lambd: float
) -> None:
    rewards, values = [each[0] for each in responses], [each[1] for each in responses]
    advantages, returns = generalized_advantages(rewards, values, gamma=gamma, lambd=lambd)
    for r, v, a, g in zip(rewards, values, advantages, returns, strict=True):
        np.testing.assert_allclose(a, plain_gae(r, v, gamma, lambd), atol=1e-4)
        np.testing.assert_allclose(g, a + v, atol=1e-6)


@given(RESPONSES, DISCOUNT, st.randoms())
def test_gae_obeys_its_laws(responses: list[np.ndarray], gamma: float, random: object) -> None:
    rewards, values = [each[0] for each in responses], [each[1] for each in responses]
    both = generalized_advantages(rewards, values, gamma=gamma, lambd=0.9)
    order = list(range(len(responses)))
    random.shuffle(order)  # type: ignore[attr-defined]
    permuted = generalized_advantages(
        [rewards[i] for i in order], [values[i] for i in order], gamma=gamma, lambd=0.9
    )
    scaled = generalized_advantages([3 * r for r in rewards], [3 * v for v in values], gamma=gamma, lambd=0.9)
    plain = generalized_advantages(rewards, [0 * v for v in values], gamma=gamma, lambd=1.0)[1]
    telescoped = generalized_advantages(rewards, values, gamma=gamma, lambd=1.0)[1]
    for i, r in enumerate(rewards):
        for kind in (0, 1):
            np.testing.assert_array_equal(permuted[kind][order.index(i)], both[kind][i])
            np.testing.assert_allclose(scaled[kind][i], 3 * both[kind][i], atol=1e-4)
        # λ = 1: the returns do not depend on the critic; with a reward at the end only, they are REINFORCE++'s.
        np.testing.assert_allclose(telescoped[i], plain[i], atol=1e-4)
        last = token_rewards(float(r.sum()), np.zeros_like(r), kl_coef=0.0)
        expected = discounted_returns(float(r.sum()), np.zeros_like(r), kl_coef=0.0, gamma=gamma)
        ours = generalized_advantages([last], [0 * r], gamma=gamma, lambd=1.0)[0][0]
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_gae_wants_one_value_a_token() -> None:
    with pytest.raises(ValueError, match="one value per token"):
        generalized_advantages([np.zeros(2, np.float32)], [np.zeros(3, np.float32)], gamma=1, lambd=1)


def test_token_rewards_put_the_reward_last_and_take_the_kl_off_every_token() -> None:
    kl = np.array([0.5, -1.0, 2.0], np.float32)
    np.testing.assert_allclose(token_rewards(3.0, kl, kl_coef=0.1), [-0.05, 0.1, 2.8], atol=1e-6)
    assert len(token_rewards(1.0, kl[:0], kl_coef=0.1)) == 0


@given(hnp.arrays(np.float64, (3, 7), elements=NUMBERS), st.sampled_from([0.1, 0.5, 10.0]))
def test_value_loss_is_its_formula(numbers: np.ndarray, clip: float) -> None:
    values, old, returns = numbers
    result = clipped_value_loss(*(torch.from_numpy(each) for each in numbers), value_clip=clip)
    bounded = np.clip(values, old - clip, old + clip)
    expected = np.maximum((values - returns) ** 2, (bounded - returns) ** 2)
    np.testing.assert_allclose(result.loss, expected, atol=1e-12)
    np.testing.assert_array_equal(result.clipped, np.abs(values - old) > clip)


def test_value_loss_has_the_gradient_of_finite_differences_and_none_behind_the_clip() -> None:
    old, returns = torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, 1.0, -1.0, 0.05]).double()
    at = torch.tensor([0.1, 0.5, 0.5, -0.15]).double().requires_grad_()

    def loss(values: torch.Tensor) -> torch.Tensor:
        return clipped_value_loss(values, old, returns, value_clip=0.2).loss.sum()

    (gradient,) = torch.autograd.grad(loss(at), at)
    for i, found in enumerate(gradient):
        offset = torch.zeros(4, dtype=torch.float64)
        offset[i] = 1e-6
        numeric = (loss(at + offset) - loss(at - offset)) / 2e-6
        assert found.item() == pytest.approx(numeric.item(), abs=1e-6)
    assert gradient[1] == 0  # it has moved towards the return, and further than the clip
    assert gradient[2] != 0  # it has moved away from the return


@given(hnp.arrays(np.float64, (2, 9), elements=NUMBERS))
def test_explained_variance_is_numpys(numbers: np.ndarray) -> None:
    returns, values = numbers
    error = returns - values
    sums = [(len(x), x.sum(), np.square(x).sum()) for x in (error, returns)]
    expected = 1 - error.var() / returns.var() if returns.var() > 1e-9 else None
    if expected is not None:
        assert explained_variance(*sums) == pytest.approx(expected, abs=1e-6)
    assert explained_variance((3, 0.0, 0.0), (3, 6.0, 14.0)) == 1.0
    assert explained_variance((3, 1.0, 1.0), (3, 6.0, 12.0)) == 0.0


def test_distillation_alone_pulls_towards_the_teacher() -> None:
    student, teacher = np.array([-1.0, -2.0], np.float32), np.array([-3.0, -0.5], np.float32)
    distance = reverse_kl(student, teacher)
    np.testing.assert_allclose(distance, [2.0, -1.5])
    np.testing.assert_allclose(
        with_distillation(np.zeros(2, np.float32), distance, opd_kl_coef=0.5), [-1, 0.75]
    )


def test_reverse_kl_is_a_divergence_in_expectation() -> None:
    rng = np.random.default_rng(0)
    student, teacher = (np.log(rng.dirichlet(np.ones(6))).astype(np.float32) for _ in range(2))
    assert np.exp(student) @ reverse_kl(student, teacher) > 0
    assert np.exp(student) @ reverse_kl(student, student) == 0


def test_sequences_the_policy_has_left_are_masked_where_they_were_bad() -> None:
    counts = [2, 0, 3, 1]
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    new = torch.tensor([-1.5, -1.1, -9.0, 0.0, 0.0, -2.0])
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    mask = off_policy_sequence_mask(new, old, advantages, torch.tensor(counts), delta=0.25)
    expected, start = [], 0
    for count in counts:
        distance = float((old - new)[start : start + count].mean()) if count else 0.0
        expected += [0.0 if advantages[start + i] < 0 and distance > 0.25 else 1.0 for i in range(count)]
        start += count
    assert mask.tolist() == expected and 0 < sum(expected) < len(expected)


@settings(max_examples=30)
@given(RESPONSES, st.integers(1, 3), st.sampled_from([0.5, 4.0]), NUMBERS)
def test_whitening_does_not_care_who_holds_the_tokens(
    responses: list[np.ndarray], ranks: int, scale: float, shift: float
) -> None:
    """Shift, scale and split over data parallel ranks, of which some hold nothing."""
    values = [each[0] for each in responses]
    shares = [values[rank::ranks] for rank in range(ranks)]

    whole = np.concatenate([np.empty(0), *values]).astype(np.float64)
    results = _whiten_on_ranks(shares)
    again = _whiten_on_ranks([[scale * v + shift for v in share] for share in shares])
    flat = np.concatenate([np.empty(0), *(v for share in results for v in share)])
    flat_again = np.concatenate([np.empty(0), *(v for share in again for v in share)])
    if len(whole) < 2 or whole.std() < 1e-2:
        return
    assert abs(flat.mean()) < 1e-5 and flat.std(ddof=1) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(flat_again, flat, atol=2e-3)


def _whiten_on_ranks(shares: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """`whiten` as every rank calls it: the sums of all ranks, round by round, then each rank with them."""
    known: list[np.ndarray] = []
    while True:
        asked: list[np.ndarray] = []
        results = []
        for share in shares:
            results.append(_with_sums(share, known, asked))
        if not asked:
            return results
        known.append(np.sum(asked, axis=0))


def _with_sums(share: list[np.ndarray], known: list[np.ndarray], asked: list[np.ndarray]) -> list[np.ndarray]:
    rounds = iter(range(10))

    class WaitingError(Exception):
        pass

    def all_reduce(array: np.ndarray) -> np.ndarray:
        number = next(rounds)
        if number < len(known):
            return known[number]
        asked.append(array)
        raise WaitingError

    try:
        return whiten(share, all_reduce)
    except WaitingError:
        return []
