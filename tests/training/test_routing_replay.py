"""Experts of tokens that are replayed: recorded by an earlier pass, or given by the rollout."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import (
    in_each_layout,
    init_single_process,
    log_probs_of,
    make_actor,
    make_batch,
    make_config,
    run_ranks,
    tiny_experts_config,
    write_hf_model,
)

from rltrain.data.batch import TrainBatch
from rltrain.megatron.training.share import RankShare
from rltrain.sample import Sample
from rltrain.schema import samples_to_table, table_to_samples

pytestmark = pytest.mark.slow

LAYERS, EXPERTS, TOP_K = 4, 4, 2


@pytest.fixture(scope="module")
def experts_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    init_single_process()
    return write_hf_model(tmp_path_factory.mktemp("experts"), tiny_experts_config())


def random_routes(batch: TrainBatch, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        rng.random((len(tokens) - 1, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K].reshape(len(tokens) - 1, -1)
        .astype(np.int16)
        for tokens in batch.tokens
    ]  # fmt: skip


def gaps(one: Any, other: Any) -> float:
    return float(np.abs(np.concatenate(one) - np.concatenate(other)).max())


def test_recorded_routes_are_those_that_are_taken_again(experts_model: Path, tmp_path: Path) -> None:
    batch = make_batch(8)
    actor = make_actor(make_config(experts_model, use_routing_replay=True), tmp_path)
    share = RankShare(actor.config, actor.shape, batch)
    own = actor.log_probs(share)
    assert share.routes is not None
    assert share.routes[0].shape == (len(batch.tokens[0]) - 1, LAYERS, TOP_K)
    assert (share.routes[0][:, 1] == -1).all() and (share.routes[0][:, [0, 2, 3]] >= 0).all()  # 1 is dense

    given = dataclasses.replace(batch, routes=[each.reshape(len(each), -1) for each in share.routes])
    config = make_config(experts_model, use_rollout_routing_replay=True)
    replaying = make_actor(config, tmp_path / "r3")
    assert gaps(log_probs_of(replaying, given), own) == 0.0
    elsewhere = dataclasses.replace(batch, routes=random_routes(batch))
    assert gaps(log_probs_of(replaying, elsewhere), own) > 1e-2
    # The reference's passes are its own.
    assert gaps(replaying.log_probs(RankShare(config, replaying.shape, elsewhere), "ref_"), own) == 0.0


def test_after_a_step_tokens_still_go_where_they_went_before(experts_model: Path, tmp_path: Path) -> None:
    """With a router that has moved a lot: what trains is the same as with these routes given from outside."""
    batch = make_batch(8)
    steps = {"num_steps_per_rollout": 2, "global_batch_size": 4, "lr": 0.3}
    recorded = make_actor(make_config(experts_model, use_routing_replay=True, **steps), tmp_path)
    share = RankShare(recorded.config, recorded.shape, batch)
    recorded.log_probs(share)
    routes = [each.reshape(len(each), -1) for each in share.routes]
    given = make_actor(make_config(experts_model, use_rollout_routing_replay=True, **steps), tmp_path / "a")
    free = make_actor(make_config(experts_model, **steps), tmp_path / "b")
    metrics = recorded.train(0, batch)
    assert given.train(0, dataclasses.replace(batch, routes=routes)) == metrics
    assert free.train(0, batch)["train/loss"] != metrics["train/loss"]


@pytest.mark.parametrize("method", ["uniform", "block"])
def test_recomputation_takes_the_routes_of_its_micro_batch(
    experts_model: Path, tmp_path: Path, method: str
) -> None:
    batch = make_batch(8)
    batch = dataclasses.replace(batch, routes=random_routes(batch))
    results = []
    recompute = {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": 1 if method == "uniform" else 2,
    }
    for number, changes in enumerate(({}, recompute)):
        actor = make_actor(
            make_config(experts_model, use_rollout_routing_replay=True, **changes), tmp_path / str(number)
        )
        metrics = actor.train(0, batch)
        results.append((metrics, torch.cat([p.detach().flatten() for p in actor.models[0].parameters()])))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sp-ep2": {
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "cp2": {"context_parallel_size": 2},
    "pp2-vpp2": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
}  # fmt: skip


def replayed_and_recorded(config: Any, work: Path) -> tuple[dict[str, float], list[np.ndarray]]:
    """Metrics of a step with given routes, and the routes that a free pass then records on this rank."""
    batch = make_batch(8)
    given = dataclasses.replace(batch, routes=random_routes(batch))
    actor = make_actor(config.replace(use_rollout_routing_replay=True), work / "given")
    metrics = actor.train(0, given)
    free = make_actor(config.replace(use_routing_replay=True), work / "free")
    share = RankShare(free.config, free.shape, batch)
    free.log_probs(share)
    assert share.routes is not None
    return metrics, share.routes


def in_all_layouts(configs: dict[str, Any], work: Path) -> dict[str, Any]:
    return in_each_layout(replayed_and_recorded, configs, work)


def test_in_every_layout_tokens_go_to_the_same_experts(experts_model: Path, tmp_path: Path) -> None:
    expected, routes = replayed_and_recorded(make_config(experts_model), tmp_path / "one")
    configs = {
        name: make_config(experts_model, actor_num_gpus_per_node=2, **layout)
        for name, layout in LAYOUTS.items()
    }
    ranks = run_ranks(in_all_layouts, configs, tmp_path)
    for name in LAYOUTS:
        for metrics, _ in (rank[name] for rank in ranks):
            assert metrics["train/loss"] == pytest.approx(expected["train/loss"], abs=2e-6), name
            assert metrics["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4), name
        for i, whole in enumerate(routes):
            # Pipeline stages know their own layers.
            parts = [rank[name][1][i] for rank in ranks if len(rank[name][1][i])]
            assert (np.max(parts, axis=0) == whole).all(), (name, i)


def test_samples_bring_their_routes_to_the_trainer() -> None:
    def answer(prompt: int, new: int, first: int) -> dict[str, Any]:
        rows = np.arange(first, first + (prompt + new - 1) * 2, dtype=np.int32)
        return {
            "prompt_tokens": prompt, "completion_tokens": new,
            "routed_experts": base64.b64encode(rows.tobytes()).decode(),
        }  # fmt: skip

    sample = Sample(index=0, group_index=0, prompt="p", tokens=[1, 2, 3], reward=1.0)
    sample.append_response_tokens(tokens=[4, 5], log_probs=[0.0, 0.0], meta_info=answer(3, 2, 0))
    sample.append_response_tokens(tokens=[6, 7], trainable=False)  # a tool's
    sample.append_response_tokens(tokens=[8], log_probs=[0.0], meta_info=answer(7, 1, 100))
    # Four rows of the first request, and what the second one added behind them.
    expected = [[0, 1], [2, 3], [4, 5], [6, 7], [108, 109], [110, 111], [112, 113]]
    assert sample.rollout_routed_experts.tolist() == expected
    assert Sample.from_dict(sample.to_dict()).rollout_routed_experts.tolist() == expected

    other = Sample(
        index=1, group_index=0, prompt="p", tokens=[1, 2], response_length=1, rollout_log_probs=[0.0]
    )
    table = samples_to_table(
        [sample, other], step=0, attempt=0, dataset="train", rewards=[1.0, 0.0], train_rewards=[1.0, 0.0]
    )
    batch = TrainBatch.from_arrow(table)
    assert batch.routes is not None
    assert batch.routes[0].tolist() == expected and batch.routes[1].tolist() == [[-1, -1]]
    assert table_to_samples(table)[0].rollout_routed_experts.tolist() == expected
    assert TrainBatch.from_arrow(table.drop_columns(["routed_experts"])).routes is None
