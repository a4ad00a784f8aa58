"""Skipped steps, other policies, distillation, custom losses, hooks, freezing, and what is recorded of tokens."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
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
    write_hf_model,
)

from rltrain.arguments.config import Config
from rltrain.data.batch import TrainableTokens, TrainBatch
from rltrain.run.errors import UserError

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


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("teacher"), tiny_config(), seed=3)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import importlib

    (tmp_path / "own_training.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.reload(importlib.import_module("own_training"))
    module.calls.clear()
    return module


def weights_of(actor: Any) -> torch.Tensor:
    return torch.cat([weight.detach().flatten().clone() for m in actor.models for weight in m.parameters()])


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


# --- functions of the user


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
        ({"freeze_params_name_list": ["("]}, "no regular expression"),
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


# --- what is recorded


@pytest.mark.parametrize("steps", [1, 2])
def test_the_trainer_writes_what_it_saw_of_every_token(model_dir: Path, tmp_path: Path, steps: int) -> None:
    batch = dataclasses.replace(make_batch(7, masked=2), indices=np.arange(70, 77))
    config = make_config(
        model_dir, num_steps_per_rollout=steps, advantage_estimator="reinforce_plus_plus", gamma=0.5
    )
    actor = make_actor(config, tmp_path)
    expected, trainable = log_probs_of(actor, batch), TrainableTokens.of(batch)
    actor.train(3, batch)
    actor._tokens.wait()
    table = pq.read_table(tmp_path / "rollouts_trainer/step=000003/attempt=0/part-0.parquet")
    from rltrain.schema import TRAINER_SCHEMA

    assert table.schema.equals(TRAINER_SCHEMA)
    rows = table.to_pylist()
    assert [row["index"] for row in rows] == list(range(70, 77)) and {row["step"] for row in rows} == {3}
    for i, row in enumerate(rows):
        if i < 2:
            assert row["trainer_log_probs"] is row["trainer_entropies"] is row["advantages"] is None
            continue
        mask, found = trainable.masks[i], np.array(row["trainer_log_probs"])
        np.testing.assert_allclose(found[mask], expected[i], atol=1e-5)
        assert np.isnan(found[~mask]).all() and len(row["trainer_entropies"]) == len(mask)
        assert (np.array(row["trainer_entropies"])[mask] > 0).all()
        assert np.array(row["advantages"])[mask][-1] == pytest.approx(batch.train_rewards[i])
    assert not list((tmp_path / "rollouts_trainer").rglob(".*"))


def test_tokens_that_cannot_be_written_do_not_stop_the_training(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "rollouts_trainer").write_text("in the way")
    actor = make_actor(make_config(model_dir), tmp_path)
    actor.train(0, make_batch(4))
    actor.train(1, make_batch(4))
    kind, fields = actor._registry.events[-1]
    assert kind == "trainer_tokens_not_saved" and "Error" in fields["reason"]
    quiet = make_actor(make_config(model_dir, save_trainer_tokens=False), tmp_path / "quiet")
    quiet.train(0, make_batch(4))
    quiet._tokens.wait()
    assert not (tmp_path / "quiet" / "rollouts_trainer").exists()
    assert threading.active_count() < 20


def test_metrics_of_speed_and_memory(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.megatron import RecordingRegistry

    from rltrain.megatron.actor import MegatronTrainActor
    from rltrain.megatron.training import speed
    from rltrain.run.role import RoleContext

    monkeypatch.setattr(speed, "peak_flops", lambda: 1e12)
    context = RoleContext(tmp_path, 0, "trainer", 0, "", "")
    config = make_config(model_dir, use_kl_loss=True, num_steps_per_rollout=2, advantage_estimator="ppo")
    actor = MegatronTrainActor(config, context, RecordingRegistry())  # type: ignore[arg-type]
    batch = make_batch(8)
    metrics = actor.train(0, batch)
    for phase in ("ref_log_probs", "log_probs", "critic_train", "actor_train"):
        assert 0 < metrics[f"perf/{phase}_s"] < metrics["perf/train_all_s"]
    whole = metrics["perf/tokens_per_s_per_rank"] * metrics["perf/train_all_s"]
    assert whole == pytest.approx(batch.num_tokens)
    assert metrics["perf/mfu"] == pytest.approx(metrics["perf/tflops_per_rank"])
    assert 0.05 < metrics["perf/peak_memory_gib"] < 100
    json.dumps(metrics, allow_nan=False)


def test_the_gap_to_the_engine_is_measured_three_ways(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(5)
    actor = make_actor(make_config(model_dir), tmp_path)
    trainable = TrainableTokens.of(batch)
    gap = np.concatenate(
        [own - engine for own, engine in zip(
            log_probs_of(actor, batch), trainable.select(batch.rollout_log_probs), strict=True)]
    ).astype(np.float64)  # fmt: skip
    metrics = actor.train(0, batch)
    assert metrics["train/logprob_abs_diff"] == pytest.approx(np.abs(gap).mean(), rel=1e-4)
    assert metrics["train/logprob_abs_diff_max"] == pytest.approx(np.abs(gap).max(), rel=1e-4)
    assert metrics["train/logprob_k3"] == pytest.approx((np.exp(gap) - 1 - gap).mean(), rel=1e-4)


def test_mismatch_is_measured_without_being_corrected(model_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(6)
    plain, measured, corrected = (
        make_actor(make_config(model_dir, **options), tmp_path).train(0, batch)
        for options in ({}, {"get_mismatch_metrics": True}, {"use_tis": True})
    )
    assert measured["train/grad_norm"] == plain["train/grad_norm"]
    assert measured["train/tis"] == corrected["train/tis"] and "train/tis" not in plain
    assert corrected["train/grad_norm"] != plain["train/grad_norm"]
