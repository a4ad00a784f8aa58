"""Functions of the user in the trainer: losses, hooks, a model provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron import (
    make_actor,
    make_batch,
    make_config,
    weights_of,
)

pytestmark = pytest.mark.slow

OWN = """
import torch
from rltrain.megatron.custom_loss import response_log_probs

calls = []

def init(args):
    calls.append(("init", args.lr))

def before_log_prob(args, model, store_prefix):
    calls.append(("log_probs", store_prefix, len(model)))

def before_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    calls.append(("step", rollout_id, step_id, optimizer.param_groups[0]["lr"], opt_param_scheduler is not None))

def policy_gradient(args, batch, logits, sum_of_sample_mean):
    log_probs, entropies = response_log_probs(args, batch, logits)
    assert logits.shape[1] == sum(batch["total_lengths"])
    losses = [-a * (new - old).exp() for a, new, old in zip(batch["advantages"], log_probs, batch["log_probs"])]
    return sum_of_sample_mean(torch.cat(losses)), {"my_entropy": sum_of_sample_mean(torch.cat(entropies)).detach()}

def no_scalar(args, batch, logits, sum_of_sample_mean):
    return logits.sum(-1), {}

def provider(pre_process, post_process, config, args):
    from rltrain.megatron.model.specs import decoder_spec
    from megatron.core.models.gpt import GPTModel
    calls.append(("provider", pre_process, post_process))
    return GPTModel(config, decoder_spec(config, None), 61, 512, pre_process, post_process,
                    position_embedding_type="rope", rotary_base=10000.0)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import importlib

    (tmp_path / "own_training.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.reload(importlib.import_module("own_training"))
    module.calls.clear()
    return module


def test_a_custom_loss_that_says_the_same_takes_the_same_step(
    model_dir: Path, tmp_path: Path, own: Any
) -> None:
    batch = make_batch(9, masked=2, longest=8)
    for options in ({"micro_batch_size": 2}, {"calculate_per_token_loss": True, "micro_batch_size": 16}):
        common = {"num_steps_per_rollout": 2, "adam_eps": 1e-3, "eps_clip": 100.0, "eps_clip_high": 100.0}
        plain = make_actor(make_config(model_dir, **common, **options), tmp_path)
        config = make_config(
            model_dir, **common, **options, loss_type="custom_loss",
            custom_loss_function_path="own_training.policy_gradient",
        )  # fmt: skip
        custom = make_actor(config, tmp_path)
        expected, found = plain.train(0, batch), custom.train(0, batch)
        assert found["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-6)
        assert found["train/my_entropy"] == pytest.approx(expected["train/entropy"], rel=1e-5)
        assert found["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4)
        torch.testing.assert_close(weights_of(custom), weights_of(plain), atol=2e-5, rtol=0)


def test_a_custom_loss_that_is_no_scalar_is_named(model_dir: Path, tmp_path: Path, own: Any) -> None:
    config = make_config(
        model_dir, loss_type="custom_loss", custom_loss_function_path="own_training.no_scalar"
    )
    with pytest.raises(ValueError, match=r"own_training\.no_scalar: loss is of shape .*; expected a scalar"):
        make_actor(config, tmp_path).train(0, make_batch(4))


def test_hooks_are_called_as_slime_calls_them(model_dir: Path, tmp_path: Path, own: Any) -> None:
    config = make_config(
        model_dir, num_steps_per_rollout=2, use_kl_loss=True, kl_loss_coef=0.1,
        custom_megatron_init_path="own_training.init",
        custom_megatron_before_log_prob_hook_path="own_training.before_log_prob",
        custom_megatron_before_train_step_hook_path="own_training.before_step",
    )  # fmt: skip
    make_actor(config, tmp_path).train(5, make_batch(8))
    assert own.calls == [
        ("init", 1e-3), ("log_probs", "ref_", 1), ("log_probs", "", 1),
        ("step", 5, 0, 1e-3, True), ("step", 5, 1, 1e-3, True),
    ]  # fmt: skip


def test_what_the_init_function_sets_holds_for_the_trainer(model_dir: Path, tmp_path: Path, own: Any) -> None:
    def init(args: Any) -> None:
        args.lr, args.note = 0.25, "seen by every function"

    own.init = init
    actor = make_actor(make_config(model_dir, custom_megatron_init_path="own_training.init"), tmp_path)
    assert actor.config.optimizer.lr == actor.policy.optimizer.param_groups[0]["lr"] == 0.25
    assert actor.config.namespace.note == actor.config.of_critic().namespace.note == "seen by every function"


def test_a_model_provider_of_ones_own_is_trained(model_dir: Path, tmp_path: Path, own: Any) -> None:
    config = make_config(model_dir, custom_model_provider_path="own_training.provider")
    batch = make_batch(6)
    ours, theirs = make_actor(make_config(model_dir), tmp_path), make_actor(config, tmp_path)
    assert ("provider", True, True) in own.calls
    assert theirs.train(0, batch) == ours.train(0, batch)
