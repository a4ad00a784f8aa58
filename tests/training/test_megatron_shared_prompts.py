"""Samples that share their beginnings: log-probs, loss and gradients are those of samples that don't."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import (
    VOCAB_SIZE,
    init_single_process,
    make_config,
    run_ranks,
    tiny_config,
    tiny_experts_config,
    write_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from model.test_families import SWITCHES

from rltrain.arguments.config import Config
from rltrain.data.batch import TrainBatch

pytestmark = pytest.mark.slow

# Prompts, each with its responses: tokens of the prompt, of each response, and of the turn that some begin with.
Groups = list[tuple[int, list[int], int]]
GROUPS: Groups = [
    (20, [3, 9, 9, 14], 0),
    (1, [5, 2, 7], 0),
    (12, [1, 1, 30], 0),
    (9, [20, 20, 25, 31, 4], 11),
]


def grouped_batch(groups: Groups, seed: int = 0) -> TrainBatch:
    """Groups of samples; of every group the first two are the same sample."""
    rng = np.random.default_rng(seed)
    tokens, lengths, masks = [], [], []
    for prompt, responses, turn in groups:
        head, first_turn = rng.integers(0, VOCAB_SIZE, prompt), rng.integers(0, VOCAB_SIZE, turn)
        for i, length in enumerate(responses):
            response = rng.integers(0, VOCAB_SIZE, length)
            response[:turn] = first_turn[:length] if i % 3 else response[:turn]
            mask = (rng.random(length) < 0.8).astype(np.int8)
            mask[[0, -1]] = 1
            sample = np.concatenate([head, response]).astype(np.int32)
            if i == 1 and len(tokens[-1]) == len(sample):
                sample = tokens[-1].copy()
            tokens.append(sample)
            lengths.append(length)
            masks.append(mask)
    return TrainBatch(
        tokens=tokens,
        response_lengths=lengths,
        loss_masks=masks,
        train_rewards=rng.normal(size=len(tokens)).astype(np.float32),
        rollout_log_probs=[-rng.random(n).astype(np.float32) * 5 for n in lengths],
    )


def layout_flags(share: bool, budget: int, **more: Any) -> dict[str, Any]:
    return {
        "share_prompts": share, "use_dynamic_batch_size": True, "max_tokens_per_gpu": budget,
        "log_probs_max_tokens_per_gpu": budget, "random_init": True, "entropy_coef": 0.01, **more,
    }  # fmt: skip


def gradients(models: list[Any], config: Config, shape: Any, batch: TrainBatch) -> dict[str, Any]:
    """Log-probs and entropies of the training pass, its sums, and every gradient on this rank."""
    from rltrain.megatron.training.forward_backward import forward_backward, forward_log_probs, token_loss
    from rltrain.megatron.training.recording import SeenTokens
    from rltrain.megatron.training.share import RankShare

    share = RankShare(config, shape, batch)
    inputs = share.loss_inputs()
    inputs = type(inputs)(**inputs.given(), advantages=share.trainable.spread(batch.train_rewards))
    log_probs = share.per_token(lambda each: forward_log_probs(models, each, shape, config))
    for chunk in models:
        chunk.zero_grad_buffer()
    seen = SeenTokens()
    sums = forward_backward(models, share.micro_batches(0, inputs), token_loss(shape, config, seen.note))
    named = [each for chunk in models for each in chunk.module.named_parameters()]
    return {
        "log_probs": log_probs,
        "seen": seen.collect(share)["trainer_log_probs"],
        "sums": {name: float(value) for name, value in sums.items()},
        "gradients": {name: value.main_grad.clone().numpy() for name, value in named},
        "shared": share.num_shared(),
    }


def built(config: Config) -> tuple[list[Any], Any]:
    from rltrain.megatron.device import megatron_scope
    from rltrain.megatron.model.build import build_model, read_shape, wrap_data_parallel

    shape = read_shape(config)
    with megatron_scope():
        return wrap_data_parallel(build_model(shape, config), config.parallel, config.model), shape


def assert_equal(shared: dict[str, Any], separate: dict[str, Any]) -> None:
    for name in ("log_probs", "seen"):
        for ours, theirs in zip(shared[name], separate[name], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert shared["sums"] == pytest.approx(separate["sums"], rel=1e-4, abs=1e-5)
    largest = max(np.abs(each).max() for each in separate["gradients"].values())
    assert largest > 0
    for name, gradient in separate["gradients"].items():
        assert np.abs(shared["gradients"][name] - gradient).max() <= 1e-5 * largest, name


def latent_config() -> dict[str, Any]:
    """A model with latent attention, which asks for the angles of positions in every layer."""
    return tiny_config("DeepseekV3ForCausalLM", **SWITCHES["DeepseekV3ForCausalLM"])


@pytest.fixture(scope="module", params=["dense", "experts", "latent"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Any], Any, Config]:
    init_single_process()
    shape = {
        "dense": lambda: tiny_config(max_position_embeddings=512),
        "experts": tiny_experts_config,
        "latent": latent_config,
    }[request.param]()
    config = make_config(
        write_config(tmp_path_factory.mktemp(request.param), shape), **layout_flags(True, 100)
    )
    return *built(config), config


group = st.tuples(
    st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=6), st.sampled_from([0, 0, 12])
)


@given(
    groups=st.lists(group, min_size=1, max_size=5),
    budget=st.integers(20, 300),
    least=st.integers(1, 8),
    seed=st.integers(0, 5),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_sharing_changes_nothing(
    model: tuple[list[Any], Any, Config], groups: Groups, budget: int, least: int, seed: int
) -> None:
    from rltrain.data import prefixes
    from rltrain.megatron.model import prefix_attention

    models, shape, config = model
    batch = grouped_batch(groups, seed)
    separate = gradients(models, config.replace(**layout_flags(False, budget)), shape, batch)
    assert not separate["shared"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "LEAST", least)
        patch.setattr(prefix_attention, "_SMALL", 60 if seed % 2 else 256)
        shared = gradients(models, config.replace(**layout_flags(True, budget)), shape, batch)
    assert_equal(shared, separate)


def test_beside_kernels_for_whole_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerEngine's know of no shared beginnings; plain torch stands in for them here."""
    from megatron.core.models.common.embeddings import rope_utils

    from rltrain.megatron.model.attention import PackedAttention
    from rltrain.megatron.model.layers.te_attention import sharing_attention
    from rltrain.megatron.model.specs import TorchSpecProvider
    from rltrain.megatron.training import share

    init_single_process()
    calls = {"attention": 0, "angles": 0}

    class WholeSequencesOnly(PackedAttention):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls["attention"] += 1
            assert kwargs["packed_seq_params"].calls is None
            return super().forward(*args, **kwargs)

    def rotate(t: torch.Tensor, offsets: torch.Tensor, angles: torch.Tensor, **_: Any) -> torch.Tensor:
        calls["angles"] += 1
        own = torch.cat([angles[: end - start] for start, end in itertools.pairwise(offsets.tolist())])
        return rope_utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), own).squeeze(1)

    config = make_config(
        write_config(tmp_path, tiny_config(max_position_embeddings=512)), **layout_flags(True, 400)
    )
    core = sharing_attention(WholeSequencesOnly)
    monkeypatch.setattr(TorchSpecProvider, "core_attention", lambda self: core)
    models, shape = built(config)
    assert not [name for name in models[0].state_dict() if "core_attention" in name]
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", rotate)
    models[0].module.config.apply_rope_fusion = True
    batch = grouped_batch(GROUPS)
    separate = gradients(models, config.replace(share_prompts=False), shape, batch)
    assert calls["attention"] and calls["angles"]
    assert_equal(gradients(models, config, shape, batch), separate)

    monkeypatch.setattr(share, "use_transformer_engine", lambda: True)
    unasked = config.replace(share_prompts=None)
    assert share.RankShare(unasked, shape, batch).num_shared()
    few = grouped_batch([(20, [90, 80, 90], 0), (9, [60], 0)])  # one tenth is shared
    assert not share.RankShare(unasked, shape, few).num_shared()
    assert share.RankShare(config, shape, few).num_shared() == 40
    wanted = unasked.replace(megatron={"transformer": {"deterministic_mode": True}})
    assert not share.RankShare(wanted, shape, batch).num_shared()
    counting = unasked.replace(megatron={"transformer": {"moe_router_bias_update_rate": 1e-3}})
    assert "--moe-router-bias-update-rate" in (share.kept_separate(counting, shape) or "")


TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2-two-samples": {"use_dynamic_batch_size": False, "micro_batch_size": 2},
    "tp2-sp": TP2 | {"sequence_parallel": True},
    "pp2-full": PP2 | FULL,
    "pp2-vpp2": PP2 | {"num_layers_per_virtual_pipeline_stage": 1},
    "ep2-allgather": {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"},
}


def both_ways(config: Config, work: Path) -> Any:
    models, shape = built(config)
    batch = grouped_batch(GROUPS)
    return [gradients(models, config.replace(share_prompts=share), shape, batch) for share in (True, False)]


def all_layouts(configs: dict[str, Config], work: Path) -> Any:
    from helpers.megatron import in_each_layout

    return in_each_layout(both_ways, configs, work)


def test_in_every_layout(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "model", tiny_experts_config())
    configs = {
        name: make_config(directory, **layout_flags(True, 70, **flags)) for name, flags in LAYOUTS.items()
    }
    latent = write_config(tmp_path / "latent", latent_config())
    configs |= {
        f"latent-{name}": make_config(latent, **layout_flags(True, 70, **LAYOUTS[name]))
        for name in ("tp2-sp", "pp2-full")
    }
    ranks = run_ranks(all_layouts, configs, tmp_path / "work")
    for name in configs:
        for found in (rank[name] for rank in ranks):
            assert found[0]["shared"] > 50 and found[1]["shared"] == 0, name
        for rank in ranks:
            shared, separate = rank[name]
            largest = max(np.abs(each).max() for each in separate["gradients"].values())
            for parameter, gradient in separate["gradients"].items():
                difference = np.abs(shared["gradients"][parameter] - gradient).max()
                assert difference <= 1e-5 * largest, (name, parameter)
        for kind in ("log_probs", "seen"):  # a sample's are where it was trained on
            for i in range(sum(len(responses) for _, responses, _ in GROUPS)):
                ours, theirs = (max((rank[name][way][kind][i] for rank in ranks), key=len) for way in (0, 1))
                assert len(theirs), (name, kind, i)
                np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        {"advantage_estimator": "ppo", "critic_lr": 3e-3, "kl_coef": 0.1, "num_steps_per_rollout": 2},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "balance_by_flops": True},
        {"loss_type": "sft_loss", "calculate_per_token_loss": True},
    ],
    ids=["ppo", "reference", "sft"],
)
def test_whole_steps(tmp_path: Path, flags: dict[str, Any]) -> None:
    """With critic and reference, and their log-probs; two rollouts, so that the second sees what the first changed."""
    from helpers.megatron import make_actor, write_hf_model

    init_single_process()
    directory = write_hf_model(tmp_path / "model", tiny_config())
    metrics, weights = [], []
    for share in (True, False):
        config = make_config(
            directory, **layout_flags(share, 90, adam_eps=1e-3, **flags) | {"random_init": False}
        )
        actor = make_actor(config, tmp_path / str(share))
        metrics.append([actor.train(step, grouped_batch(GROUPS, step)) for step in range(2)])
        weights.append(torch.cat([each.detach().flatten() for each in actor.models[0].parameters()]))
    for shared, separate in zip(*metrics, strict=True):
        assert shared == pytest.approx(separate, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-5)
