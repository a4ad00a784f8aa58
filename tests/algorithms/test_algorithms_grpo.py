"""Group normalisation of rewards against NumPy, and what must hold for any groups."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltrain.algorithms.grpo import normalize_rewards

SAMPLES = st.lists(st.tuples(st.integers(0, 4), st.integers(-5, 5)), min_size=1, max_size=30)


def reference(rewards: list[float], groups: list[int], std: bool) -> np.ndarray:
    values, labels, out = np.array(rewards, float), np.array(groups), np.zeros(len(rewards))
    for group in set(groups):
        members = values[labels == group]
        if len(members) > 1:
            centred = members - members.mean()
            out[labels == group] = centred / (members.std(ddof=1) + 1e-6) if std else centred
    return out


@given(SAMPLES, st.booleans())
def test_matches_numpy_for_uneven_groups(samples: list[tuple[int, int]], std: bool) -> None:
    groups, rewards = [g for g, _ in samples], [float(r) for _, r in samples]
    result = normalize_rewards(rewards, groups, std=std)
    np.testing.assert_allclose(result, reference(rewards, groups, std), atol=1e-9)


@given(SAMPLES, st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter(samples: list[tuple[int, int]], random) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(samples)))
    random.shuffle(order)
    groups, rewards = [g for g, _ in samples], [float(r) for _, r in samples]
    plain = normalize_rewards(rewards, groups)
    shuffled = normalize_rewards([rewards[i] for i in order], [groups[i] for i in order])
    np.testing.assert_allclose(shuffled, [plain[i] for i in order], atol=1e-9)


def test_groups_that_say_nothing_get_zero() -> None:
    # 0.1 + 0.2 style residues must not be blown up by a standard deviation of nearly zero
    assert normalize_rewards([0.1] * 7 + [3.0], [0] * 7 + [1]) == [0.0] * 8


def test_failed_samples_are_left_out() -> None:
    result = normalize_rewards([1.0, 0.0, -100.0], ["a", "a", "a"], mask=[True, True, False])
    np.testing.assert_allclose(result, [2**-0.5, -(2**-0.5), 0.0], atol=1e-5)


def test_lengths_must_fit() -> None:
    with pytest.raises(ValueError, match="one entry per sample"):
        normalize_rewards([1.0], [0, 0])


def test_import_needs_no_torch() -> None:
    code = (
        "import rltrain.algorithms.grpo, rltrain.arguments.hf_config, sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
