"""Parallel sizes that don't fit together, and what is named as nearest."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.megatron import tiny_config

from rltrain import arguments
from rltrain.arguments.groups.parallel import ParallelSizes, virtual_stages
from rltrain.arguments.hf_config import check_hf_config
from rltrain.run.errors import UserError

BASE = ["--hf-checkpoint", "/m", "--prompt-data", "p", "--rollout-batch-size", "8", "--num-rollout", "1"]


def parse(ranks: int, *flags: str) -> Any:
    return arguments.parse([*BASE, "--actor-num-gpus-per-node", str(ranks), *flags])


def tensor(n: int) -> list[str]:
    return ["--tensor-model-parallel-size", str(n)]


def pipeline(n: int) -> list[str]:
    return ["--pipeline-model-parallel-size", str(n)]


def context(n: int) -> list[str]:
    return ["--context-parallel-size", str(n)]


def experts(n: int) -> list[str]:
    return ["--expert-model-parallel-size", str(n)]


def test_sizes_that_fit() -> None:
    sizes = ParallelSizes.of(parse(16, *tensor(2), *pipeline(2), *context(2), *experts(4)).parallel)
    assert (sizes.model, sizes.data, sizes.expert, sizes.expert_tensor) == (8, 2, 4, 2)
    assert ParallelSizes.of(parse(4, *experts(4), "--expert-tensor-parallel-size", "1").parallel).data == 4


@pytest.mark.parametrize(
    ("ranks", "flags", "messages"),
    [
        (
            6,
            [*tensor(2), *pipeline(2)],
            [
                "--tensor-model-parallel-size 2 × --pipeline-model-parallel-size 2 × --context-parallel-size 1 = 4",
                "6 trainer ranks (--actor-num-nodes 1 × --actor-num-gpus-per-node 6)",
                "4 or 8 ranks",
            ],
        ),
        (8, context(3), ["Nearest that does", "--context-parallel-size 4; or 6 or 9 ranks"]),
        (2, tensor(4), ["--tensor-model-parallel-size 2", "or 4 ranks"]),
        (
            8,
            [*pipeline(2), *experts(8)],
            ["= 8 does not divide the 4 ranks of a pipeline stage", "--expert-model-parallel-size 4"],
        ),
        (2, pipeline(0), ["--pipeline-model-parallel-size is 0"]),
        (1, ["--num-virtual-stages-per-pipeline-rank", "2"], ["need --pipeline-model-parallel-size"]),
        (
            2,
            [*pipeline(2), "--num-virtual-stages-per-pipeline-rank", "2",
             "--num-layers-per-virtual-pipeline-stage", "1"],
            ["give one of them"],
        ),
        (1, ["--decoder-first-pipeline-num-layers", "2"], ["need --pipeline-model-parallel-size"]),
    ],
)  # fmt: skip
def test_refused(ranks: int, flags: list[str], messages: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(ranks, *flags)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "layers", "stages"),
    [
        ([], 5, None),
        (pipeline(2), 4, None),
        ([*pipeline(2), "--num-layers-per-virtual-pipeline-stage", "2"], 12, 3),
        ([*pipeline(2), "--num-layers-per-virtual-pipeline-stage", "6"], 12, None),
        ([*pipeline(2), "--num-virtual-stages-per-pipeline-rank", "3"], 12, 3),
        ([*pipeline(4), "--decoder-first-pipeline-num-layers", "3"], 15, None),
    ],
)
def test_virtual_stages(flags: list[str], layers: int, stages: int | None) -> None:
    assert virtual_stages(parse(4, *flags).parallel, layers) == stages


@pytest.mark.parametrize(
    ("flags", "layers", "message"),
    [
        (pipeline(4), 6, "does not divide the model's 6 layers. Pipeline sizes that do: 1, 2, 3, 6"),
        ([*pipeline(2), "--num-layers-per-virtual-pipeline-stage", "4"], 12, "Use one of 1, 2, 3, 6"),
        ([*pipeline(4), "--decoder-first-pipeline-num-layers", "3"], 16, "leave 13 of the model's 16 layers for 3"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_shared_out(flags: list[str], layers: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        virtual_stages(parse(4, *flags).parallel, layers)


EXPERTS = tiny_config("Qwen3MoeForCausalLM", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (tiny_config(), experts(2), "has no experts"),
        (EXPERTS, experts(4), "--expert-model-parallel-size 4 does not divide num_experts 6"),
        (EXPERTS, tensor(2), "needs --sequence-parallel"),
        (
            EXPERTS | {"moe_intermediate_size": 25},
            [*tensor(2), "--sequence-parallel"],
            "--expert-tensor-parallel-size 2 does not divide moe_intermediate_size 25",
        ),
        (EXPERTS | {"num_experts": None}, [], "lacks num_experts"),
    ],
)
def test_experts_that_cannot_be_shared_out(config: dict[str, Any], flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_hf_config(config, parse(4, *flags).parallel, "/m")
