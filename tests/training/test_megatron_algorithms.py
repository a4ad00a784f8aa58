"""Every algorithm through a real training step: against NumPy, and independent of packing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import (
    log_probs_of,
    make_actor,
    make_batch,
    make_config,
)

from rltrain.data.batch import TrainableTokens

pytestmark = pytest.mark.slow

CUSTOM = """
import torch

calls = []

def advantages(args, rollout_data):
    rollout_data["advantages"] = [
        torch.full_like(mask, reward) for mask, reward in zip(rollout_data["loss_masks"], rollout_data["rewards"])
    ]
    calls.append(rollout_data)

def doubled(args, rollout_id, rollout_data):
    assert "log_probs" in rollout_data
    calls.append(rollout_id)
    rollout_data["advantages"] = [2 * each for each in rollout_data["advantages"]]

def keeps(args, rollout_id, rollout_data):
    calls.append(dict(rollout_data))

def unmasks(args, rollout_id, rollout_data):
    rollout_data["loss_masks"] = [torch.zeros_like(each) for each in rollout_data["loss_masks"]]

def too_short(args, rollout_data):
    rollout_data["advantages"] = [mask[1:] for mask in rollout_data["loss_masks"]]

def keep_nothing(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
    assert [len(each) for each in train_log_probs] == kwargs["response_lengths"]
    return pg_loss, [torch.zeros_like(mask) for mask in loss_masks], {"dropped": torch.ones_like(pg_loss)}

def wrong_shape(args, *, pg_loss, loss_masks, **kwargs):
    return pg_loss[1:], loss_masks, {}

def sums(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    return lambda x: sum((part * mask).sum() for part, mask in zip(x.split(response_lengths), loss_masks))

def vector(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    return lambda x: x
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "custom_algorithms.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)


def train(model_dir: Path, run_dir: Path, batch: Any, rollouts: int = 1, **changes: Any) -> dict[str, float]:
    actor = make_actor(make_config(model_dir, **changes), run_dir)
    return [actor.train(i, batch) for i in range(rollouts)][-1]


ALGORITHMS: dict[str, dict[str, Any]] = {
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.001, "eps_clip_high": 0.001},
    "cispo": {"advantage_estimator": "cispo"},
    "rloo": {"advantage_estimator": "rloo"},
    "reinforce++": {
        "advantage_estimator": "reinforce_plus_plus",
        "kl_coef": 0.1,
        "gamma": 0.9,
        "normalize_advantages": True,
    },
    "reinforce++baseline": {"advantage_estimator": "reinforce_plus_plus_baseline", "kl_coef": 0.1},
    "tis": {"use_tis": True, "tis_clip": 1.5},
    "icepop": {
        "use_tis": True,
        "tis_clip_low": 0.5,
        "custom_tis_function_path": "rltrain.algorithms.mismatch.icepop",
    },
    "dr-grpo": {"custom_pg_loss_reducer_function_path": "rltrain.algorithms.reduce.constant_length"},
    "unbiased-kl": {
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "kl_loss_type": "low_var_kl",
        "use_unbiased_kl": True,
    },
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_packing_does_not_change_the_step(algorithm: str, model_dir: Path, tmp_path: Path) -> None:
    """Two rollouts of two optimizer steps; with more micro-batches than samples in the last layout."""
    batch = make_batch(9, masked=2, longest=8)
    layouts: list[dict[str, Any]] = [{"micro_batch_size": 1}, {"micro_batch_size": 16}]
    layouts.append(
        {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 20, "log_probs_max_tokens_per_gpu": 30}
    )
    common = {**ALGORITHMS[algorithm], "num_steps_per_rollout": 2, "lr": 1e-2, "adam_eps": 1e-3}
    results = [train(model_dir, tmp_path, batch, 2, **common, **layout) for layout in layouts]
    assert all(np.isfinite(value) for value in results[0].values())
    for metrics in results[1:]:
        assert metrics == pytest.approx(results[0], rel=2e-3, abs=2e-5)


def test_on_policy_estimators_with_equal_rewards_take_the_same_step(model_dir: Path, tmp_path: Path) -> None:
    """At ratio 1 the gradients of GRPO, GSPO and CISPO are the same: only what they do off-policy differs."""
    batch = make_batch(6)
    norms = [
        train(model_dir, tmp_path, batch, advantage_estimator=name)["train/grad_norm"]
        for name in ("grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus")
    ]
    np.testing.assert_allclose(norms, norms[0], rtol=1e-5)


def test_kl_in_the_reward_is_taken_off_the_return(model_dir: Path, tmp_path: Path) -> None:
    """The policy loss at ratio 1 is −Σ weight·A: compare with returns computed here by a plain loop."""
    batch = make_batch(5)
    config = make_config(
        model_dir, advantage_estimator="reinforce_plus_plus", kl_coef=0.3, gamma=0.7, kl_loss_type="k1", lr=0.05
    )  # fmt: skip
    actor = make_actor(config, tmp_path)
    actor.train(0, batch)  # so that the policy has left its reference
    own = log_probs_of(actor, batch)
    with actor.others.reference.in_place_of(actor.models):
        reference = log_probs_of(actor, batch)
    expected = 0.0
    for i in range(5):
        rewards = [-0.3 * float(x) for x in own[i] - reference[i]]
        rewards[-1] += float(batch.train_rewards[i])
        n = len(rewards)
        returns = [sum(0.7 ** (k - t) * rewards[k] for k in range(t, n)) for t in range(n)]
        expected -= np.mean(returns) / 5
    assert np.abs(own[0] - reference[0]).max() > 1e-3
    assert actor.train(1, batch)["train/pg_loss"] == pytest.approx(expected, abs=1e-5)


def test_whitened_advantages_have_mean_zero_over_tokens(model_dir: Path, tmp_path: Path) -> None:
    metrics = train(
        model_dir, tmp_path, make_batch(7, masked=2), normalize_advantages=True, calculate_per_token_loss=True
    )
    assert metrics["train/pg_loss"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["train/grad_norm"] > 0


def test_tis_weighs_each_token_with_its_clamped_ratio(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(6)
    config = make_config(
        model_dir, use_tis=True, tis_clip=1.5, tis_clip_low=0.5, calculate_per_token_loss=True
    )
    actor = make_actor(config, tmp_path)
    trainable = TrainableTokens.of(batch)
    own = log_probs_of(actor, batch)
    engine = trainable.select(batch.rollout_log_probs)
    total, clipped, count = 0.0, 0, 0
    for i in range(6):
        for x, y in zip(own[i], engine[i], strict=True):
            ratio = float(np.exp(x - y))
            weight = min(max(ratio, 0.5), 1.5)
            total -= weight * float(batch.train_rewards[i])
            clipped += weight != ratio
            count += 1
    metrics = actor.train(0, batch)
    assert metrics["train/pg_loss"] == pytest.approx(total / count, rel=1e-4)
    assert metrics["train/tis_clipfrac"] == pytest.approx(clipped / count, rel=1e-5)
    assert metrics["train/ois"] == pytest.approx(1.0)


def test_the_engines_log_probs_can_be_the_old_ones(model_dir: Path, tmp_path: Path) -> None:
    """`--use-rollout-logprobs`: the ratio is that of trainer and engine, and it is clipped."""
    batch = make_batch(6)
    config = make_config(model_dir, use_rollout_logprobs=True, eps_clip=0.2, eps_clip_high=0.3)
    actor = make_actor(config, tmp_path)
    own = log_probs_of(actor, batch)
    engine = TrainableTokens.of(batch).select(batch.rollout_log_probs)
    expected, clipped = [], []
    for x, y, advantage in zip(own, engine, batch.train_rewards, strict=True):
        ratio = np.exp(x - y)
        free, bounded = -advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.3)
        expected.append(np.maximum(free, bounded).mean())
        clipped.append((bounded > free).mean())
    metrics = actor.train(0, batch)
    assert metrics["train/pg_loss"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert metrics["train/pg_clipfrac"] == pytest.approx(np.mean(clipped), rel=1e-5)
    assert 0 < metrics["train/pg_clipfrac"] < 1


def test_dr_grpo_loss_is_the_sum_over_a_constant(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(6, masked=1)
    path = ALGORITHMS["dr-grpo"]
    metrics = train(model_dir, tmp_path, batch, **path, micro_batch_size=4)
    sums = [float(r) * int(m.sum()) for r, m in zip(batch.train_rewards, batch.loss_masks, strict=True)]
    assert metrics["train/pg_loss"] == pytest.approx(-sum(sums) / 1000 / 6, rel=1e-4)
    assert metrics["train/loss"] == pytest.approx(metrics["train/pg_loss"])


def test_custom_functions_get_slimes_data_and_may_do_what_ours_do(
    custom: None, model_dir: Path, tmp_path: Path
) -> None:
    import custom_algorithms

    batch = make_batch(5, masked=1)
    plain = train(model_dir, tmp_path, batch)
    ours = train(model_dir, tmp_path, batch, custom_advantage_function_path="custom_algorithms.advantages")
    assert ours == pytest.approx(plain, rel=1e-5, abs=1e-6)
    data = custom_algorithms.calls[0]
    assert {"tokens", "rewards", "kl", "log_probs", "rollout_log_probs", "loss_masks"} <= data.keys()
    assert sorted(map(len, data["log_probs"])) == sorted(batch.response_lengths[1:])
    custom_algorithms.calls.clear()
    twice = train(model_dir, tmp_path, batch, rollout_data_postprocess_path="custom_algorithms.doubled")
    assert twice["train/pg_loss"] == pytest.approx(2 * plain["train/pg_loss"], rel=1e-5, abs=1e-6)
    assert custom_algorithms.calls == [0]
    summed = train(
        model_dir, tmp_path, batch, custom_pg_loss_reducer_function_path="custom_algorithms.sums",
        calculate_per_token_loss=True,
    )  # fmt: skip
    per_token = train(model_dir, tmp_path, batch, calculate_per_token_loss=True)
    assert summed == pytest.approx(per_token, rel=1e-5, abs=1e-6)
    nothing = train(
        model_dir, tmp_path, batch, use_tis=True, custom_tis_function_path="custom_algorithms.keep_nothing"
    )
    assert (nothing["train/loss"], nothing["train/grad_norm"]) == (0.0, 0.0)
    assert nothing["train/dropped"] > 0


def test_the_entropy_before_training_is_that_of_transformers(
    custom: None, model_dir: Path, tmp_path: Path
) -> None:
    """Of policy and reference, the same weights at first: at every trained token, and its mean as metrics."""
    import custom_algorithms
    from transformers import AutoModelForCausalLM

    custom_algorithms.calls.clear()
    batch, temperature = make_batch(6, masked=1), 1.5
    changes = {"rollout_temperature": temperature, "use_rollout_entropy": True, "use_kl_loss": True}
    changes |= {"rollout_data_postprocess_path": "custom_algorithms.keeps"}
    metrics = train(model_dir, tmp_path, batch, **changes)
    model, expected = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), []
    for tokens, length, mask in zip(batch.tokens, batch.response_lengths, batch.loss_masks, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, -length - 1 : -1]
        log_probs = (logits.double() / temperature).log_softmax(-1)
        expected.append((-(log_probs.exp() * log_probs).sum(-1) * torch.from_numpy(mask)).numpy())
    (kept,) = custom_algorithms.calls
    places = [[each.tolist() for each in batch.tokens].index(tokens.tolist()) for tokens in kept["tokens"]]
    assert sorted(places) == [1, 2, 3, 4, 5]
    for name in ("entropy", "ref_entropy"):
        for place, own in zip(places, kept[name], strict=True):
            np.testing.assert_allclose(own.numpy(), expected[place], rtol=1e-4, atol=1e-5)
        mean = sum(each.sum() for each in expected) / sum(mask.sum() for mask in batch.loss_masks)
        assert metrics[f"rollout/{name}"] == pytest.approx(mean, rel=1e-5)
    alone = train(model_dir, tmp_path, batch, use_rollout_entropy=True, use_rollout_logprobs=True,
                  rollout_temperature=temperature)  # fmt: skip
    assert alone["rollout/entropy"] == pytest.approx(mean, rel=1e-5) and "rollout/ref_entropy" not in alone
    assert alone["train/ppo_kl"] != 0.0  # its log-probs are not in the place of the engine's


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"custom_advantage_function_path": "custom_algorithms.too_short"}, r"too_short.*sample \d"),
        (
            {"use_tis": True, "custom_tis_function_path": "custom_algorithms.wrong_shape"},
            "wrong_shape: pg_loss",
        ),
        ({"custom_pg_loss_reducer_function_path": "custom_algorithms.vector"}, "vector.*scalar"),
        ({"rollout_data_postprocess_path": "custom_algorithms.unmasks"}, "has changed loss_masks"),
    ],
)
def test_custom_functions_that_return_something_else_are_named(
    custom: None, model_dir: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        train(model_dir, tmp_path, make_batch(4), **changes)


@pytest.mark.parametrize("flag", ["use_tis", "use_rollout_logprobs"])
def test_corrections_need_the_engines_log_probs(flag: str, model_dir: Path, tmp_path: Path) -> None:
    batch = dataclasses.replace(make_batch(4), rollout_log_probs=None)
    with pytest.raises(ValueError, match="no log-probs"):
        train(model_dir, tmp_path, batch, **{flag: True})


def test_an_empty_micro_batch_reaches_custom_functions_as_one_masked_token() -> None:
    from rltrain.megatron.training.micro_batch import Responses

    responses = Responses.of(make_batch(2), [], torch.device("cpu"))
    assert responses.response_lengths == [1] and responses.loss_masks[0].tolist() == [0]
    assert responses.collapse(responses.expand(torch.zeros(0))).shape == (0,)
