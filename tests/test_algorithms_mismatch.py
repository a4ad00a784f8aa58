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
