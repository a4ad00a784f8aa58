"""Weights from every layout of trainer ranks into a real engine, each rank sending its own share of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TOKEN
from helpers.engine import GivenEngine
from helpers.megatron import (
    in_each_layout,
    make_actor,
    make_config,
    run_ranks,
    tiny_config,
    tiny_experts_config,
    write_hf_model,
)

from rltrain.arguments.config import Config

pytestmark = pytest.mark.slow

TP2, PP2, CP2 = ({f"{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "context"))
EP2 = {"expert_model_parallel_size": 2}
ETP1, ETP2 = {"expert_tensor_parallel_size": 1}, {"expert_tensor_parallel_size": 2}
# Which ranks have something to send where only one of a machine sends; ranks 2 and 3 are on a second one.
LAYOUTS: dict[str, dict[str, tuple[dict[str, Any], set[int]]]] = {
    "dense": {
        "dp4": ({}, {0, 2}),
        "tp2-pp2": (TP2 | PP2, {0, 2}),
        "tp2-cp2": (TP2 | CP2, {0, 2}),
        "pp4": ({"pipeline_model_parallel_size": 4}, {0, 1, 2, 3}),
    },
    "experts": {
        "ep2-tp2": (EP2 | TP2 | ETP1 | {"sequence_parallel": True}, {0, 1, 2}),
        "etp2-tp1": (ETP2, {0, 2}),
        "pp2-ep2": (PP2 | EP2, {0, 1, 2, 3}),
    },
}
CONFIGS = {
    "dense": tiny_config(num_hidden_layers=4),
    "experts": tiny_experts_config(),
}
TRANSPORTS = {
    "tensor": {"update_weight_transport": "tensor"},
    "distributed": {"update_weight_transport": "distributed"},
    "delta": {"update_weight_transport": "distributed", "update_weight_mode": "delta"},
}
PUSHES = [
    (kind, layout, transport) for kind in LAYOUTS for layout in LAYOUTS[kind] for transport in TRANSPORTS
]


def push(config: Config, work: Path) -> dict[str, Any]:
    """Three pushes, with changed weights in between.

    Returns:
        Parts of tensors that this rank has sent in the first: names, places of their first elements, bytes. On rank 0
        also the engine's version and checksums after each push, and its checksums after it has loaded the same weights
        from a directory.
    """
    import torch.distributed as dist

    rank = dist.get_rank()
    os.environ["SLURMD_NODENAME"] = f"node{rank // 2}"
    actor = make_actor(config, work)
    share, sent = actor._exporter.share, list[list[tuple[str, int | None, int]]]()

    def noted(*args: Any, **options: Any) -> Iterator[Any]:
        sent.append([])
        for parts in share(*args, **options):
            sent[-1] += [(part.name, part.first, part.data.nbytes) for part in parts]
            yield parts

    actor._exporter.share = noted
    engine = GivenEngine(config.custom["engine_url"], TOKEN)
    pushed, expected = [], []
    for version in (1, 2, 3):
        actor.update_weights(lambda: [engine], version)
        if rank == 0:
            pushed.append((engine.get_weight_version(), engine.weight_checksums()))
        actor.export(work / f"v{version}")
        if rank == 0:
            engine.update_weights_from_disk(work / f"v{version}", f"file {version}")
            expected.append((str(version), engine.weight_checksums()))
        with torch.no_grad():
            for chunk in actor.models:
                for name, weight in chunk.named_parameters():
                    if "linear_fc" in name and weight.ndim == 2:  # the same on all replicas
                        weight[:1, :3] += 0.5
    return {"sent": sent[0], "pushed": pushed, "expected": expected}


def push_in_each(configs: dict[str, Config], work: Path) -> dict[str, Any]:
    """`push` in every layout and by every transport."""
    return in_each_layout(push, configs, work)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: write_hf_model(root / kind, config) for kind, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def pushes(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What each of four ranks has seen, by layout and transport."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kind, model in models.items():
        with GivenEngine.launch({"model_path": str(model), "skip_tokenizer_init": True}, TOKEN) as engine:
            configs = {}
            for layout, (changes, _) in LAYOUTS[kind].items():
                for transport, flags in TRANSPORTS.items():
                    size = {"actor_num_gpus_per_node": 4, "update_weight_buffer_size": 24_000}
                    name = f"{layout} {transport}"
                    config = make_config(model, **size, **changes, **flags)
                    configs[name] = replace(config, custom={"engine_url": engine.url})
            ranks = run_ranks(push_in_each, configs, tmp_path_factory.mktemp(kind), world_size=4)
        for name in configs:
            layout, transport = name.split()
            found[layout, transport] = [rank[name] for rank in ranks]
    return found


def test_ranks_that_hold_nothing_of_a_kind_have_nothing_to_share() -> None:
    """As the first stage of a pipeline whose first layers have no experts."""
    from rltrain.megatron.model.export import Held, _in_windows

    group: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    assert list(_in_windows(Held([], group, 0, (0,)), {0: [0], 1: [0]}, None, 100)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "layout", "transport"), PUSHES)
def test_engines_get_the_weights_that_a_directory_would_give_them(
    kind: str, layout: str, transport: str, pushes: dict[tuple[str, str], list[dict[str, Any]]]
) -> None:
    ranks = pushes[layout, transport]
    assert ranks[0]["pushed"] == ranks[0]["expected"]
    assert len({str(checksums) for _, checksums in ranks[0]["pushed"]}) == 3
    parts = [(name, first) for rank in ranks for name, first, _ in rank["sent"]]
    assert len(parts) == len(set(parts)) > 10  # each once
    # Ranks that hold the same weights have as much to send as one another, whatever the sizes of tensors.
    if (layout, transport) == ("dp4", "distributed"):
        first, second = (sum(nbytes for *_, nbytes in ranks[rank]["sent"]) for rank in (0, 2))
        assert abs(first - second) < 0.01 * first and any(place for _, place in parts)
    senders = {number for number, rank in enumerate(ranks) if rank["sent"]}
    assert senders == ({0, 1, 2, 3} if transport == "tensor" else LAYOUTS[kind][layout][1])
