"""PPO through real training steps: against NumPy, independent of packing, resumed, and with a critic that learns."""

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
    tiny_config,
    weights_of,
    write_hf_model,
)

from rltrain.data.batch import TrainableTokens
from rltrain.run.errors import UserError

pytestmark = pytest.mark.slow

PPO: dict[str, Any] = {
    "advantage_estimator": "ppo", "critic_lr": 3e-3, "gamma": 0.9, "lambd": 0.8, "num_steps_per_rollout": 2,
    "kl_coef": 0.1, "normalize_advantages": True, "adam_eps": 1e-3,
}  # fmt: skip


def values_of(actor: Any, batch: Any) -> Any:
    """V of every trainable token."""
    from rltrain.megatron.training.share import RankShare

    return actor.critic.values(RankShare(actor.config, actor.shape, batch))


@pytest.mark.parametrize("tied", [False, True])
def test_the_critic_starts_from_the_policys_weights(tmp_path: Path, tied: bool) -> None:
    init_single_process()
    directory = write_hf_model(tmp_path / "model", tiny_config(tie_word_embeddings=tied))
    actor = make_actor(make_config(directory, advantage_estimator="ppo"), tmp_path)
    policy = dict(actor.models[0].named_parameters())
    critic = dict(actor.critic.trained.models[0].named_parameters())
    assert critic["output_layer.weight"].shape == (1, 32) and critic["output_layer.bias"].shape == (1,)
    for name, weight in critic.items():
        if not name.startswith("output_layer."):
            assert torch.equal(weight, policy[name]), name


def test_losses_are_those_of_a_plain_loop(model_dir: Path, tmp_path: Path) -> None:
    """One optimizer step: the value loss is (V − G)², the policy loss −Σ weight·A, with A from a plain recursion."""
    batch = make_batch(6)
    config = make_config(model_dir, advantage_estimator="ppo", gamma=0.9, lambd=0.8, kl_coef=0.3, lr=0.05)
    actor = make_actor(config, tmp_path)
    actor.train(0, batch)  # so that the policy has left its reference
    own, values = log_probs_of(actor, batch), values_of(actor, batch)
    with actor.others.reference.in_place_of(actor.models):
        reference = log_probs_of(actor, batch)
    value_loss = policy_loss = 0.0
    for i in range(6):
        n = len(own[i])
        rewards = [-0.3 * float(x) for x in own[i] - reference[i]]
        rewards[-1] += float(batch.train_rewards[i])
        advantage = 0.0
        for t in range(n - 1, -1, -1):
            after = float(values[i][t + 1]) if t + 1 < n else 0.0
            advantage = rewards[t] + 0.9 * after - float(values[i][t]) + 0.9 * 0.8 * advantage
            value_loss += advantage**2 / n / 6  # V − G is −A
            policy_loss -= advantage / n / 6
    metrics = actor.train(1, batch)
    assert metrics["critic/value_loss"] == pytest.approx(value_loss, rel=1e-4)
    assert metrics["train/pg_loss"] == pytest.approx(policy_loss, rel=1e-4, abs=1e-6)
    assert metrics["critic/value_clipfrac"] == 0.0
    assert metrics["critic/value"] == pytest.approx(np.concatenate(values).mean(), rel=1e-4)


def test_the_value_gradient_is_that_of_finite_differences(model_dir: Path, tmp_path: Path) -> None:
    """The gradient of the head's bias: shifting all values by ε changes the loss by ε times it."""
    batch = make_batch(4)
    actor = make_actor(
        make_config(model_dir, advantage_estimator="ppo", lambd=1.0, value_clip=100.0), tmp_path
    )
    from rltrain.megatron.training.critic import value_loss
    from rltrain.megatron.training.forward_backward import forward_backward
    from rltrain.megatron.training.share import RankShare

    share = RankShare(actor.config, actor.shape, batch)
    returns = share.trainable.spread(batch.train_rewards)
    inputs = dataclasses.replace(share.loss_inputs(), old_values=actor.critic.values(share), returns=returns)
    trained = actor.critic.trained
    bias = trained.models[0].output_layer.bias

    def loss() -> float:
        sums = forward_backward(trained.wrapped, share.micro_batches(0, inputs), value_loss(100.0))
        return float(sums["value_loss"])

    middle = loss()
    gradient = float(bias.main_grad)
    with torch.no_grad():
        bias += 1e-2
    above = loss()
    with torch.no_grad():
        bias -= 2e-2
    assert (above - loss()) / 2e-2 == pytest.approx(gradient, rel=1e-3)
    assert middle > 0


def test_packing_does_not_change_the_step(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(9, masked=2, longest=8)
    layouts: list[dict[str, Any]] = [{"micro_batch_size": 1}, {"micro_batch_size": 16}]
    layouts.append(
        {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 20, "log_probs_max_tokens_per_gpu": 30}
    )
    results = []
    for layout in layouts:
        actor = make_actor(make_config(model_dir, **PPO, **layout), tmp_path)
        results.append([actor.train(i, batch) for i in range(2)][-1])
    assert all(np.isfinite(value) for value in results[0].values())
    for metrics in results[1:]:
        assert metrics == pytest.approx(results[0], rel=2e-3, abs=2e-5)


def test_the_critic_learns_what_the_rewards_are(model_dir: Path, tmp_path: Path) -> None:
    """Rewards that the first token of the prompt tells: after a while most of their variance is explained."""
    base = make_batch(16, longest=6)
    rewards = np.array([float(tokens[0] % 2) for tokens in base.tokens], np.float32)
    batch = dataclasses.replace(base, train_rewards=rewards)
    config = make_config(
        model_dir, advantage_estimator="ppo", critic_lr=1e-2, num_critic_only_steps=100, value_clip=10.0
    )
    actor = make_actor(config, tmp_path)
    before = weights_of(actor.policy)
    metrics = [actor.train(i, batch) for i in range(25)]
    assert metrics[0]["critic/explained_variance"] < 0.1
    assert metrics[-1]["critic/explained_variance"] > 0.8
    assert metrics[-1]["critic/value_loss"] < 0.2 * metrics[0]["critic/value_loss"]
    assert not any(name.startswith("train/") for name in metrics[-1])  # only the critic was trained
    assert torch.equal(weights_of(actor.policy), before)


def test_resuming_equals_going_on(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(
        model_dir, **PPO, save=str(tmp_path / "c"), critic_lr_warmup_iters=3, num_critic_only_steps=1,
        ref_update_interval=1,
    )  # fmt: skip
    batches = [make_batch(8, seed=seed) for seed in range(4)]
    first = make_actor(config, tmp_path)
    for i in range(2):
        first.train(i, batches[i])
    first.save(1)
    expected = [first.train(i, batches[i]) for i in (2, 3)]
    init_single_process()
    second = make_actor(config, tmp_path)
    assert second.start_rollout_id == 2
    assert [second.train(i, batches[i]) for i in (2, 3)] == expected
    for ours, theirs in ((second.policy, first.policy), (second.critic.trained, first.critic.trained)):
        assert torch.equal(weights_of(ours), weights_of(theirs))
    next((tmp_path / "c" / "critic" / "iter_0000002").glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"critic/iter_0000002 is missing"):
        make_actor(config, tmp_path)


def test_critic_load_takes_a_critic_or_a_model(model_dir: Path, tmp_path: Path) -> None:
    critic = make_actor(make_config(model_dir, **PPO, save=str(tmp_path / "c")), tmp_path)
    critic.train(0, make_batch(8))
    critic.save(0)
    loaded = make_actor(make_config(model_dir, **PPO, critic_load=str(tmp_path / "c" / "critic")), tmp_path)
    assert torch.equal(weights_of(loaded.critic.trained), weights_of(critic.critic.trained))
    other = write_hf_model(tmp_path / "other", tiny_config(), seed=5)
    from_model = make_actor(make_config(model_dir, **PPO, critic_load=str(other)), tmp_path)
    whole = make_actor(make_config(other, **PPO), tmp_path)
    plain = make_actor(make_config(model_dir, **PPO), tmp_path)
    assert torch.equal(weights_of(from_model.critic.trained), weights_of(whole.critic.trained))
    assert torch.equal(weights_of(from_model.policy), weights_of(plain.policy))


def test_roles_have_flags_of_their_own(model_dir: Path, tmp_path: Path) -> None:
    roles = tmp_path / "roles.yaml"
    roles.write_text(
        "megatron:\n"
        "  - {name: default, role: actor, overrides: {lr: 2e-6}}\n"
        "  - {name: default, role: critic, overrides: {lr: 5.0e-6, clip_grad: 0.3,"
        " freeze_params_name_list: [embedding]}}\n"
    )
    from rltrain import arguments

    argv = ["--hf-checkpoint", str(model_dir), "--prompt-data", "unused", "--rollout-batch-size", "8"]
    argv += ["--num-rollout", "4", "--advantage-estimator", "ppo", "--megatron-config-path", str(roles)]
    actor = make_actor(arguments.parse(argv), tmp_path)
    metrics = actor.train(0, make_batch(8))
    assert (metrics["train/lr"], metrics["critic/lr"]) == (2e-6, 5e-6)
    assert actor.critic.trained.optimizer.config.clip_grad == 0.3
    frozen = {
        name: weight.requires_grad for name, weight in actor.critic.trained.models[0].named_parameters()
    }
    assert [name for name, trained in frozen.items() if not trained] == ["embedding.word_embeddings.weight"]
    assert all(weight.requires_grad for weight in actor.models[0].parameters())


def test_policy_and_critic_take_turns_on_the_device(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment at most one of them is in, and between rollouts it is the policy."""
    actor = make_actor(make_config(model_dir, advantage_estimator="ppo", save=str(tmp_path / "c")), tmp_path)
    policy, critic = actor.policy.swap, actor.critic.trained.swap
    order = []

    def note(name: str, swap: Any, verb: str) -> None:
        call = getattr(swap, verb)

        def noted() -> None:
            order.append(f"{name} {verb}")
            call()
            assert policy.is_out or critic.is_out

        monkeypatch.setattr(swap, verb, noted)

    for name, swap in (("policy", policy), ("critic", critic)):
        for verb in ("out", "back"):
            note(name, swap, verb)
    assert critic.is_out and not policy.is_out
    actor.train(0, make_batch(4))
    actor.save(0)
    assert order == ["policy out", "critic back", "critic out", "policy back"] * 2


def test_memory_that_is_moved_away_comes_back_under_every_view() -> None:
    """The mechanism that is used with a GPU, on host memory: freed, and then the same values at all views."""
    from rltrain.megatron.device import restore, store

    buffer = torch.arange(12.0)
    views = [buffer[:4].view(2, 2), buffer[4:], torch.ones(3, dtype=torch.bfloat16)]
    expected = [view.clone() for view in views]
    stored = store([buffer, *views, torch.empty(0)])
    assert len(stored) == 2 and buffer.untyped_storage().nbytes() == 0
    restore(stored)
    for view, values in zip(views, expected, strict=True):
        assert torch.equal(view, values)
    views[1][0] = 100.0
    assert buffer[4] == 100.0


def test_host_memory_is_pinned_once() -> None:
    from rltrain.megatron import device

    weights = [torch.ones(4), torch.ones(4), torch.ones(9)]
    swap = device.HostSwap(lambda: weights)
    held = []
    for _ in range(3):
        swap._stored = device.store(weights, swap._pinned)
        held.append(sorted(each.data_ptr() for _, each in swap._stored))
        swap.back()
    assert held[0] == held[1] == held[2] and all(weight.eq(1).all() for weight in weights)


def test_returns_of_a_custom_function_are_learned(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_advantages.py").write_text(
        "def both(args, data):\n"
        "    data['advantages'] = [m.float() for m in data['loss_masks']]\n"
        "    data['returns'] = [v + 2 * m for v, m in zip(data['values'], data['loss_masks'])]\n"
        "def one(args, data):\n"
        "    data['advantages'] = [m.float() for m in data['loss_masks']]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    batch = make_batch(5)
    config = make_config(model_dir, **{**PPO, "num_steps_per_rollout": 1, "normalize_advantages": False})
    config = config.replace(custom_advantage_function_path="own_advantages.both")
    metrics = make_actor(config, tmp_path).train(0, batch)
    assert metrics["critic/value_loss"] == pytest.approx(4.0, rel=1e-4)
    assert metrics["train/pg_loss"] == pytest.approx(-1.0, rel=1e-4)
    config = config.replace(custom_advantage_function_path="own_advantages.one")
    with pytest.raises(ValueError, match=r"must set rollout_data\['returns'\]"):
        make_actor(config, tmp_path).train(0, batch)


def test_trainable_tokens_of_a_batch_are_the_ones_with_values(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(5, masked=2)
    values = values_of(make_actor(make_config(model_dir, **PPO), tmp_path), batch)
    trainable = TrainableTokens.of(batch)
    assert [len(each) for each in values] == [trainable.count(i) for i in range(5)]
