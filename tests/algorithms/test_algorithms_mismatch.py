"""Corrections for the engine's log-probs against plain loops over the tokens."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import pytest
import torch

from rltrain.algorithms.mismatch import icepop, mis, tis

RNG = np.random.default_rng(2)
LENGTHS = [4, 1, 6]
TRAIN, ROLLOUT = ([torch.from_numpy(-RNG.random(n)) for n in LENGTHS] for _ in range(2))
MASKS = [torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.zeros(1), torch.ones(6)]
VETO = 0.8  # of the third response only
LOSS = torch.from_numpy(RNG.normal(size=sum(LENGTHS)))


def call(function: Any, **settings: Any) -> tuple[np.ndarray, list[np.ndarray], dict[str, np.ndarray]]:
    args = argparse.Namespace(**{"tis_clip": 1.2, "tis_clip_low": 0.8, **settings})
    loss, masks, metrics = function(
        args,
        pg_loss=LOSS,
        train_log_probs=TRAIN,
        rollout_log_probs=ROLLOUT,
        loss_masks=MASKS,
        total_lengths=[9, 9, 9],
        response_lengths=LENGTHS,
    )
    return loss.numpy(), [mask.numpy() for mask in masks], {k: v.numpy() for k, v in metrics.items()}


def ratios(level: str) -> list[float]:
    result = []
    for train, rollout, mask in zip(TRAIN, ROLLOUT, MASKS, strict=True):
        tokens = [float(t - r) for t, r in zip(train, rollout, strict=True)]
        kept = [x for x, m in zip(tokens, mask, strict=True) if m]
        whole = {"sequence": sum(kept), "geometric": sum(kept) / max(1, len(kept))}
        result += [math.exp(whole.get(level, x)) for x in tokens]
    return result


def weight(ratio: float, mode: str) -> float:
    if mode == "truncate":
        return min(ratio, 1.2)
    if mode == "clip":
        return min(max(ratio, 0.8), 1.2)
    return ratio if 0.8 <= ratio <= 1.2 else 0.0


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "clip", "mask"])
def test_weights_of_every_level_and_mode(level: str, mode: str) -> None:
    loss, masks, metrics = call(mis, tis_level=level, tis_mode=mode)
    expected = [weight(ratio, mode) for ratio in ratios(level)]
    np.testing.assert_allclose(loss, LOSS.numpy() * expected)
    np.testing.assert_allclose(metrics["tis"], ratios(level))
    np.testing.assert_array_equal(
        metrics["tis_clipfrac"], [w != pytest.approx(r) for w, r in zip(expected, ratios(level), strict=True)]
    )
    assert all((a == b.numpy()).all() for a, b in zip(masks, MASKS, strict=True))


def test_the_named_ones_are_special_cases() -> None:
    np.testing.assert_array_equal(call(tis)[0], call(mis, tis_mode="clip")[0])
    np.testing.assert_array_equal(call(icepop)[0], call(mis, tis_mode="mask")[0])


def test_equal_policies_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROLLOUT", TRAIN)
    for function in (tis, icepop, mis):
        loss, _, metrics = call(function)
        np.testing.assert_array_equal(loss, LOSS.numpy())
        assert not metrics["tis_clipfrac"].any() and not metrics["tis_abs"].any()


def test_a_veto_takes_whole_responses_out() -> None:
    tokens = [
        [math.exp(t - r) for t, r, m in zip(train, rollout, mask, strict=True) if m]
        for train, rollout, mask in zip(TRAIN, ROLLOUT, MASKS, strict=True)
    ]
    threshold = (min(tokens[0]) + min(tokens[2])) / 2
    _, masks, metrics = call(mis, tis_veto_threshold=threshold)
    for mask, before, ratio in zip(masks, MASKS, tokens, strict=True):
        np.testing.assert_array_equal(mask, before.numpy() * (min(ratio, default=1) >= threshold))
    assert metrics["tis_veto"].sum() in (4, 6)


@pytest.mark.parametrize(("setting", "value"), [("tis_level", "word"), ("tis_mode", "drop")])
def test_unknown_settings_are_refused(setting: str, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        call(mis, **{setting: value})


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_rejection_and_veto_with_slimes_keys(level: str) -> None:
    """Against a loop: what is outside the bounds leaves the mask, a response with one catastrophic token all of it."""
    keys = {"tis_upper_bound": 1.25, "use_rs": True, "rs_level": level, "rs_veto_threshold": VETO}
    loss, masks, metrics = call(mis, **keys, rs_lower_bound=None, rs_upper_bound=None, tis_lower_bound=None)
    np.testing.assert_allclose(loss, LOSS.numpy() * np.minimum(ratios("token"), 1.25))
    by_level, by_token, start, rejected, vetoed = ratios(level), ratios("token"), 0, 0, 0
    for mask, kept in zip(MASKS, masks, strict=True):
        own = slice(start, start + len(mask))
        veto = any(m and r < VETO for m, r in zip(mask, by_token[own], strict=True))
        expected = [
            float(m and 1 / 1.25 <= r <= 1.25 and not veto) for m, r in zip(mask, by_level[own], strict=True)
        ]
        np.testing.assert_array_equal(kept, expected)
        start, vetoed, rejected = own.stop, vetoed + veto, rejected + (sum(expected) < mask.sum())
    assert vetoed and rejected
    np.testing.assert_array_equal(metrics["rs_high"], np.array(by_level) > 1.25)
    np.testing.assert_array_equal(metrics["rs_low"], np.array(by_level) < 1 / 1.25)
    assert all(
        (a == b.numpy()).all() for a, b in zip(call(mis, rs_veto_threshold=VETO)[1], MASKS, strict=True)
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_are_divided_by_their_mean(level: str) -> None:
    loss, _, metrics = call(mis, tis_level=level, tis_batch_normalize=True)
    weights = [weight(ratio, "truncate") for ratio in ratios(level)]
    mask = np.concatenate([each.numpy() for each in MASKS])
    mean = np.average(weights, weights=mask) if level == "token" else (weights[0] + weights[5]) / 2
    np.testing.assert_allclose(loss, LOSS.numpy() * weights / mean)
    np.testing.assert_allclose(metrics["tis_batch_norm_factor"], np.full(len(mask), mean))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tis_lower_bound": 2.0}, "tis_lower_bound 2.0 must be less than tis_upper_bound 1.2"),
        ({"use_rs": True, "rs_upper_bound": 0.5}, "rs_lower_bound 0.8 must be less than rs_upper_bound 0.5"),
        ({"tis_level": "geometric", "tis_batch_normalize": True}, "tis_batch_normalize needs tis_level"),
    ],
)
def test_settings_that_cannot_be_right_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(mis, **settings)
