"""Skipped steps, other policies, distillation, and training only some of the weights."""

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
    run_ranks,
    tiny_config,
    weights_of,
    write_hf_model,
)

from rltrain.arguments.config import Config
from rltrain.data.batch import TrainBatch
from rltrain.run.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("teacher"), tiny_config(), seed=3)


def broken(batch: Any) -> Any:
    """A rollout whose reward is infinite: so are loss and gradient."""
    return dataclasses.replace(batch, train_rewards=np.full(len(batch), np.inf, np.float32))


# --- steps that are skipped


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(
    model_dir: Path, tmp_path: Path, distributed_optimizer: bool
) -> None:
    config = make_config(model_dir, use_distributed_optimizer=distributed_optimizer, lr_warmup_iters=2)
    actor, undisturbed = (make_actor(config, tmp_path / name) for name in "ab")
    batches = [make_batch(8, seed=seed) for seed in range(3)]
    actor.train(0, batches[0])
    before = weights_of(actor)
    metrics = actor.train(1, broken(batches[1]))
    assert metrics["train/skipped_steps"] == 1.0 and "train/grad_norm" not in metrics
    assert torch.equal(weights_of(actor), before)
    kind, fields = actor._registry.events[-1]
    assert kind == "step_skipped"
    assert fields == {"step": 1, "optimizer_step": 0, "model": "actor", "not_finite": "loss"}
    undisturbed.train(0, batches[0])
    assert actor.train(2, batches[2]) == undisturbed.train(1, batches[2])  # Adam and schedule never saw it


def test_a_gradient_that_is_not_finite_is_told_from_a_loss(model_dir: Path, tmp_path: Path) -> None:
    actor = make_actor(make_config(model_dir), tmp_path)
    actor.train(0, make_batch(4))
    before = weights_of(actor)
    actor.policy.wrapped[0].buffers[0].grad_data[5] = torch.nan
    update = actor.policy.update({"loss": torch.tensor(1.0)})
    assert update.not_finite == "gradient" and torch.equal(weights_of(actor), before)
    assert actor.policy.wrapped[0].buffers[0].grad_data.abs().sum() == 0


def test_too_many_in_a_row_stop_the_run_with_the_last_good_state(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(model_dir, save=str(tmp_path / "c"), max_skipped_steps=3, num_steps_per_rollout=2)
    actor, good = make_actor(config, tmp_path), make_batch(8)
    metrics = actor.train(0, dataclasses.replace(good, train_rewards=np.r_[[np.inf] * 4, np.ones(4)]))
    assert metrics["train/skipped_steps"] == 1.0 and np.isfinite(metrics["train/loss"])
    actor.train(1, broken(good))  # two in a row; a good one between them and the first
    before = weights_of(actor)
    with pytest.raises(UserError, match=r"(?s)rollout 2.*last 3 steps.*saved in .*iter_0000002"):
        actor.train(2, broken(good))
    resumed = make_actor(config, tmp_path)
    assert resumed.start_rollout_id == 2 and torch.equal(weights_of(resumed), before)


# --- other policies


def test_the_reference_follows_at_intervals_also_over_a_restart(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(
        model_dir, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k3", lr=0.01, ref_update_interval=2,
        save=str(tmp_path / "c"),
    )  # fmt: skip
    actor, batch = make_actor(config, tmp_path), make_batch(8)
    kl = [actor.train(i, batch)["train/kl_loss"] for i in range(3)]
    assert kl[0] == pytest.approx(0.0, abs=1e-7) and kl[1] > 1e-4
    assert kl[2] == pytest.approx(0.0, abs=1e-7)  # after the second rollout it became the policy
    actor.save(2)
    expected = actor.train(3, batch)
    assert make_actor(config, tmp_path).train(3, batch) == expected


def test_the_old_actor_is_the_one_the_engines_had(model_dir: Path, tmp_path: Path) -> None:
    """Weights that were pushed before two rollouts stay the denominator of the ratio for both."""
    config = make_config(
        model_dir, keep_old_actor=True, lr=0.02, update_weights_interval=2, debug_train_only=True
    )
    actor, batch = make_actor(config, tmp_path), make_batch(8)
    actor.update_weights([], 0)
    generated_by = log_probs_of(actor, batch)
    engine = [np.zeros(len(mask), np.float32) for mask in batch.loss_masks]
    for each, mask, values in zip(engine, batch.loss_masks, generated_by, strict=True):
        each[mask == 1] = values
    batch = dataclasses.replace(batch, rollout_log_probs=engine)
    first, second = (actor.train(i, batch) for i in range(2))
    assert first["train/ppo_kl"] == pytest.approx(0.0, abs=1e-6)
    assert second["train/pg_clipfrac"] > 0.0  # the policy has left them
    # what is compared with the engine are their log-probs, not the policy's
    assert second["train/logprob_abs_diff"] == pytest.approx(0.0, abs=1e-6)
    actor.update_weights([], 2)
    assert actor.train(2, batch)["train/ppo_kl"] == pytest.approx(0.0, abs=1e-6)


def test_past_policies_reach_as_far_back_as_generation_runs_ahead() -> None:
    from rltrain.megatron.model.host_copy import PastPolicies

    model, past = torch.nn.Linear(1, 1, bias=False), PastPolicies(staleness=2)
    assert past.that_generated(0) is None

    def known(rollout_id: int) -> float:
        saved = past.that_generated(rollout_id)
        assert saved is not None
        with saved.in_place_of([model]):
            return float(model.weight)

    for version in range(6):
        torch.nn.init.constant_(model.weight, version)
        past.remember(version, [model])
        assert known(version) == max(0, version - 2) and known(version + 2) == version
    assert len(past._versions) == 3 and float(model.weight) == 5.0
    assert known(0) == 3.0  # after a restart nothing older is known


# --- distillation


@pytest.mark.parametrize("opd_type", ["megatron", "sglang"])
def test_distillation_adds_the_teachers_grade(
    model_dir: Path, teacher_dir: Path, tmp_path: Path, opd_type: str
) -> None:
    batch = make_batch(6)
    teacher = log_probs_of(make_actor(make_config(teacher_dir), tmp_path), batch)
    config = make_config(model_dir, use_opd=True, opd_type=opd_type, opd_kl_coef=0.5)
    if opd_type == "megatron":
        config = config.replace(opd_teacher_load=str(teacher_dir))
    else:
        given = [np.zeros(len(mask), np.float32) for mask in batch.loss_masks]
        for each, mask, values in zip(given, batch.loss_masks, teacher, strict=True):
            each[mask == 1] = values
        with pytest.raises(ValueError, match="no teacher_log_probs"):
            make_actor(config, tmp_path).train(0, batch)
        batch = dataclasses.replace(batch, teacher_log_probs=given)
    actor = make_actor(config, tmp_path)
    student = log_probs_of(actor, batch)
    distance = [s - t for s, t in zip(student, teacher, strict=True)]
    expected = np.mean([-(r - 0.5 * d).mean() for r, d in zip(batch.train_rewards, distance, strict=True)])
    metrics = actor.train(0, batch)
    assert metrics["train/pg_loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["train/opd_reverse_kl"] == pytest.approx(np.mean([d.mean() for d in distance]), rel=1e-4)


def test_distillation_alone_brings_the_student_to_the_teacher(
    model_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Trained on its own samples alone, without any reward: the exact divergence at the prompts falls."""
    config = make_config(
        model_dir, use_opd=True, opd_type="megatron", opd_teacher_load=str(teacher_dir), lr=0.01,
        use_dynamic_batch_size=True, max_tokens_per_gpu=500, log_probs_max_tokens_per_gpu=500,
    )  # fmt: skip
    actor, rng = make_actor(config, tmp_path), np.random.default_rng(0)
    prompts = rng.integers(0, 61, (8, 1)).repeat(16, axis=0).astype(np.int32)

    def divergence() -> float:
        student = _next_token_log_probs(actor, prompts)
        with actor.others.teacher.in_place_of(actor.models):
            teacher = _next_token_log_probs(actor, prompts)
        return float((student.exp() * (student - teacher)).sum(-1).mean())

    before = divergence()
    for i in range(15):
        probs = _next_token_log_probs(actor, prompts).exp().numpy()
        drawn = np.array([rng.choice(61, p=each / each.sum()) for each in probs], np.int32)
        batch = TrainBatch(
            tokens=list(np.c_[prompts, drawn]), response_lengths=[1] * 128,
            loss_masks=[np.ones(1, np.int8)] * 128, train_rewards=np.zeros(128, np.float32),
            rollout_log_probs=None,
        )  # fmt: skip
        actor.train(i, batch)
    assert divergence() < 0.5 * before


def _next_token_log_probs(actor: Any, prompts: np.ndarray) -> torch.Tensor:
    """After prompts [n, length], over the vocabulary, in fp64."""
    from rltrain.megatron.model.attention import PackedSequences

    n, length = prompts.shape
    sequences = PackedSequences.from_lengths([length] * n, torch.device("cpu"), 1)
    ids = torch.from_numpy(prompts.astype(np.int64)).reshape(1, -1)
    with torch.no_grad():
        logits = actor.models[0](ids, None, None, packed_seq_params=sequences)
    return logits[0, length - 1 :: length, :61].double().log_softmax(-1)


def test_random_weights_stay_what_they_are_whatever_else_is_loaded(
    model_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    init_single_process()
    expected = weights_of(make_actor(make_config(model_dir, random_init=True), tmp_path))
    options = {
        "use_opd": True,
        "opd_type": "megatron",
        "opd_teacher_load": str(teacher_dir),
        "random_init": True,
    }
    for more in ({}, {"advantage_estimator": "ppo", "critic_load": str(teacher_dir)}):
        init_single_process()
        actor = make_actor(make_config(model_dir, **options, **more), tmp_path)
        assert torch.equal(weights_of(actor), expected)
        assert abs(actor.train(0, make_batch(4))["train/opd_reverse_kl"]) > 0.01


# --- freezing


def test_only_what_is_named_is_trained(model_dir: Path, tmp_path: Path) -> None:
    for options, trained in (
        ({"only_train_params_name_list": [r"layers\.1\.mlp"]}, lambda name: "layers.1.mlp" in name),
        ({"freeze_params_name_list": ["embedding", "layers.0"]},
         lambda name: "embedding" not in name and "layers.0" not in name),
    ):  # fmt: skip
        config = make_config(model_dir, save=str(tmp_path / next(iter(options))), lr=0.01, **options)
        config = config.replace(use_distributed_optimizer="freeze_params_name_list" in options)
        actor, batch = make_actor(config, tmp_path), make_batch(8)
        before = {name: weight.detach().clone() for name, weight in actor.models[0].named_parameters()}
        actor.train(0, batch)
        for name, weight in actor.models[0].named_parameters():
            assert torch.equal(weight, before[name]) != trained(name), name
        actor.save(0)
        resumed = make_actor(config, tmp_path)
        assert resumed.train(1, batch) == actor.train(1, batch)


def save_and_resume(config: Config, work: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The second rollout of a trainer, and of one that resumes from its checkpoint."""
    actor = make_actor(config, work)
    actor.train(0, make_batch(6))
    actor.save(0)
    return actor.train(1, make_batch(6, seed=1)), make_actor(config, work).train(1, make_batch(6, seed=1))


def test_a_rank_whose_part_of_the_optimizer_is_only_padding_saves(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(
        model_dir, save=str(tmp_path / "checkpoints"), only_train_params_name_list=["final_layernorm"],
        use_distributed_optimizer=True, actor_num_gpus_per_node=2, lr=0.01,
    )  # fmt: skip
    for went_on, resumed in run_ranks(save_and_resume, config, tmp_path / "ranks"):
        assert went_on == resumed


def test_an_optimizer_in_host_memory_needs_a_gpu(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(model_dir)
    config = config.replace(megatron={"optimizer": {"optimizer_cpu_offload": True}})
    with pytest.raises(UserError, match="--optimizer-cpu-offload is for GPUs"):
        make_actor(config, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only_train_params_name_list": ["nothing"]}, "no parameter matches 'nothing'; names look like"),
        ({"freeze_params_name_list": [""]}, "leaves no parameter"),
        ({"freeze_params_name_list": ["("]}, "not a regular expression"),
        ({"freeze_params_name_list": ["a"], "only_train_params_name_list": ["b"]}, "give one of them"),
    ],
)
def test_names_that_make_no_sense_are_refused(
    model_dir: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_actor(make_config(model_dir, **options), tmp_path)


def test_an_optimizer_that_is_reset_begins_anew(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(8)
    actor = make_actor(make_config(model_dir, reset_optimizer_states=True, weight_decay=0.0), tmp_path)
    actor.train(0, batch)
    before = weights_of(actor)
    actor.train(1, batch)
    # Adam's first step has size lr in every direction whose gradient is not tiny
    moved = (weights_of(actor) - before).abs()
    assert moved.max() == pytest.approx(1e-3, rel=1e-3) and moved.median() > 0.99e-3
