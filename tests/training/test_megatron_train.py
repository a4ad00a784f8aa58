"""Training steps in one process: the loss against transformers and NumPy, and what must not change it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import (
    init_single_process,
    log_probs_of,
    make_actor,
    make_batch,
    make_config,
    tiny_experts_config,
    write_hf_model,
)

from rltrain.data.batch import TrainBatch

pytestmark = pytest.mark.slow


def train_once(
    model_dir: Path, run_dir: Path, batch: TrainBatch, **changes: Any
) -> tuple[dict[str, float], Any]:
    """Metrics of the first rollout, and the weights after it as one vector."""
    actor = make_actor(make_config(model_dir, **changes), run_dir)
    metrics = actor.train(0, batch)
    return metrics, torch.cat([weight.detach().flatten() for weight in actor.models[0].parameters()])


def hf_loss(model_dir: Path, batch: TrainBatch, **options: Any) -> tuple[float, float]:
    """The GRPO loss at the first step (the ratio is 1), and its gradient's norm, with transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    per_sample, total = [], torch.tensor(0.0)
    for tokens, length, mask, reward in zip(
        batch.tokens, batch.response_lengths, batch.loss_masks, batch.train_rewards, strict=True
    ):
        ids = torch.from_numpy(tokens.astype(np.int64))
        log_p = torch.log_softmax(model(ids.unsqueeze(0)).logits[0, :-1], -1)
        log_probs = log_p.gather(1, ids[1:, None]).squeeze(1)[-length:]
        losses = -reward * (log_probs - log_probs.detach()).exp() * torch.from_numpy(mask)
        total = total + losses.sum()
        per_sample.append(losses.sum() / max(1, mask.sum()))
    loss = torch.stack(per_sample).mean()
    if options.get("per_token"):
        loss = total / sum(int(mask.sum()) for mask in batch.loss_masks)
    loss.backward()
    norm = torch.sqrt(sum((p.grad.square().sum() for p in model.parameters()), torch.tensor(0.0)))
    return loss.item(), norm.item()


@pytest.mark.parametrize("per_token", [False, True])
def test_loss_and_gradient_equal_transformers(model_dir: Path, tmp_path: Path, per_token: bool) -> None:
    batch = make_batch(9, masked=2)
    metrics, _ = train_once(
        model_dir, tmp_path, batch, calculate_per_token_loss=per_token, micro_batch_size=2
    )
    loss, norm = hf_loss(model_dir, batch, per_token=per_token)
    assert metrics["train/loss"] == pytest.approx(loss, abs=1e-6)
    assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_packing_does_not_change_the_step(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(16, longest=20)
    changes = [{"micro_batch_size": 1}, {"micro_batch_size": 16}]
    changes += [{"use_dynamic_batch_size": True, "max_tokens_per_gpu": n, "log_probs_max_tokens_per_gpu": n}
                for n in (30, 100, 10_000)]  # fmt: skip
    results = [train_once(model_dir, tmp_path, batch, entropy_coef=0.01, **change) for change in changes]
    for metrics, weights in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        # Adam's first step is nearly ±lr for any gradient, so tiny differences of tiny gradients show.
        torch.testing.assert_close(weights, results[0][1], atol=2e-5, rtol=0)


def test_samples_without_trainable_tokens_cost_and_change_nothing(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(8, masked=3)
    other = dataclasses.replace(
        batch,
        tokens=[tokens[::-1].copy() if i < 3 else tokens for i, tokens in enumerate(batch.tokens)],
        train_rewards=np.where(np.arange(8) < 3, 99.0, batch.train_rewards).astype(np.float32),
    )
    first, second = (train_once(model_dir, tmp_path, each) for each in (batch, other))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_a_rollout_without_any_trainable_token_is_survived(model_dir: Path, tmp_path: Path) -> None:
    metrics, _ = train_once(model_dir, tmp_path, make_batch(4, masked=4))
    assert metrics["train/loss"] == 0.0 and metrics["train/grad_norm"] == 0.0


def test_several_steps_a_rollout_clip_against_the_sampling_policy(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(8)
    twice = TrainBatch(
        batch.tokens * 2,
        batch.response_lengths * 2,
        batch.loss_masks * 2,
        np.tile(batch.train_rewards, 2),
        batch.rollout_log_probs * 2,  # type: ignore[operator]
    )
    one, _ = train_once(model_dir, tmp_path, batch, lr=0.05)
    two, _ = train_once(model_dir, tmp_path, twice, lr=0.05, num_steps_per_rollout=2)
    assert one["train/pg_clipfrac"] == 0.0 and one["train/ppo_kl"] == 0.0
    assert two["train/pg_clipfrac"] > 0.0  # the second step meets a policy that has moved
    assert two["train/logprob_abs_diff"] == pytest.approx(one["train/logprob_abs_diff"], rel=1e-5)


def test_log_prob_difference_is_over_trainable_tokens(model_dir: Path, tmp_path: Path) -> None:
    from rltrain.data.batch import TrainableTokens

    batch = make_batch(6)
    actor = make_actor(make_config(model_dir), tmp_path)
    trainable = TrainableTokens.of(batch)
    own = log_probs_of(actor, batch)
    shifted = []
    for i, mask in enumerate(batch.loss_masks):
        engine = np.full(len(mask), 1e6, np.float32)  # must not be looked at where the mask is 0
        engine[mask == 1] = own[i] + 0.5 * (i == 0)
        shifted.append(engine)
    metrics = actor.train(0, dataclasses.replace(batch, rollout_log_probs=shifted))
    share = trainable.count(0) / sum(trainable.count(i) for i in range(6))
    assert metrics["train/logprob_abs_diff"] == pytest.approx(0.5 * share, abs=1e-5)
    assert metrics["train/logprob_abs_diff_max"] == pytest.approx(0.5, abs=1e-5)


def test_reference_stays_where_the_run_started(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(model_dir, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k3", lr=0.01)
    actor, batch = make_actor(config, tmp_path), make_batch(8)
    metrics = [actor.train(i, batch) for i in range(3)]
    assert metrics[0]["train/kl_loss"] == pytest.approx(0.0, abs=1e-7)
    assert 0 < metrics[1]["train/kl_loss"] < metrics[2]["train/kl_loss"]


def test_sft_learns_the_responses(model_dir: Path, tmp_path: Path) -> None:
    batch = dataclasses.replace(make_batch(8), rollout_log_probs=None)
    config = make_config(model_dir, loss_type="sft_loss", lr=0.02, rollout_temperature=0.1)
    actor = make_actor(config, tmp_path)
    losses = [actor.train(i, batch)["train/loss"] for i in range(20)]
    assert losses[0] == pytest.approx(np.log(61), rel=0.15)
    assert losses[-1] < 0.5 * losses[0]


def test_warm_up_and_decay(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(
        model_dir, lr=1.0, min_lr=0.1, lr_decay_style="linear", lr_warmup_iters=2, lr_decay_iters=6
    )
    actor = make_actor(config, tmp_path)
    rates = [actor.policy.update({}).learning_rate for _ in range(7)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.775, 0.55, 0.325, 0.1])


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ],
)
def test_recomputing_activations_changes_nothing(
    model_dir: Path, tmp_path: Path, recompute: dict[str, Any]
) -> None:
    batch = make_batch(8)
    plain, recomputed = (train_once(model_dir, tmp_path, batch, **each) for each in ({}, recompute))
    assert plain[0] == recomputed[0]
    assert torch.equal(plain[1], recomputed[1])


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_bf16_trains_and_resumes(model_dir: Path, tmp_path: Path, distributed_optimizer: bool) -> None:
    options: dict[str, Any] = {"bf16": True, "use_distributed_optimizer": distributed_optimizer}
    config = make_config(model_dir, save=str(tmp_path / "c"), loss_type="sft_loss", lr=1e-3, **options)
    actor = make_actor(config, tmp_path)
    batch = make_batch(8)
    exact, _ = train_once(model_dir, tmp_path, batch, loss_type="sft_loss")
    losses = [actor.train(i, batch)["train/loss"] for i in range(10)]
    assert losses[0] == pytest.approx(exact["train/loss"], rel=0.01)
    assert losses[-1] < losses[0] - 0.05  # updates smaller than bf16 can hold add up in fp32
    assert {weight.dtype for weight in actor.models[0].parameters()} == {torch.bfloat16}
    actor.save(9)
    resumed = make_actor(config, tmp_path)
    assert resumed.train(10, batch) == actor.train(10, batch)


def test_a_sample_without_reward_is_named(model_dir: Path, tmp_path: Path) -> None:
    rewards = np.array([0.5, np.nan, np.nan, 1.0], np.float32)
    batch = dataclasses.replace(make_batch(4, masked=2), train_rewards=rewards)
    with pytest.raises(ValueError, match=r"samples \[2\] have no reward"):
        train_once(model_dir, tmp_path, batch)
    train_once(model_dir, tmp_path, batch, loss_type="sft_loss")


def test_experts_are_balanced_as_transformers_says(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    init_single_process()
    config = tiny_experts_config(num_hidden_layers=2, mlp_only_layers=[])
    model_dir = write_hf_model(tmp_path / "model", config)
    batch = dataclasses.replace(make_batch(5), train_rewards=np.zeros(5, np.float32))  # no other gradient
    options = {"micro_batch_size": 5, "moe_aux_loss_coeff": 0.5, "clip_grad": 1e9}
    norm = make_actor(make_config(model_dir, **options), tmp_path).train(0, batch)["train/grad_norm"]

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    per_sample = [
        model(torch.from_numpy(tokens[None, :-1].astype(np.int64)), output_router_logits=True).router_logits
        for tokens in batch.tokens
    ]
    loss = torch.zeros(())
    for logits in zip(*per_sample, strict=True):  # of each layer
        probs = torch.cat([each.reshape(-1, 4) for each in logits]).softmax(-1)
        chosen = torch.nn.functional.one_hot(probs.topk(2).indices, 4).sum(1).float().mean(0) / 2
        loss = loss + 0.5 * 4 * (chosen * probs.mean(0)).sum()
    loss.backward()
    gradients = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    assert norm == pytest.approx(torch.stack(gradients).sum().sqrt().item(), rel=1e-4)
