"""Which processes a job has."""

from __future__ import annotations

from collections import Counter

import pytest

from hpc.planning.job_plan import make_plan
from hpc.planning.processes import JobPlan
from rltrain.arguments.config import Config


def plan(**changes: object) -> JobPlan:
    return make_plan(
        Config().replace(**{"rollout_num_gpus": 1, "hf_checkpoint": "model", **changes}), python="py"
    )


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, {"router": 1, "engine": 1, "rollout": 1, "trainer": 1}),
        (
            {"rollout_num_gpus": 4, "rollout_num_gpus_per_engine": 2, "actor_num_gpus_per_node": 3},
            {"router": 1, "engine": 2, "rollout": 1, "trainer": 3},
        ),
        ({"debug_train_only": True, "actor_num_gpus_per_node": 2}, {"rollout": 1, "trainer": 2}),
    ],
)
def test_counts(changes: dict[str, object], counts: dict[str, int]) -> None:
    assert Counter(process.role for process in plan(**changes).processes) == counts


def test_commands_and_ranks() -> None:
    processes = {process.name: process for process in plan(actor_num_gpus_per_node=2).processes}
    assert processes["engine-0"].argv == ("py", "-m", "rltrain.sglang.engine")
    assert processes["engine-0"].env == {}
    assert processes["trainer-1"].argv == ("py", "-m", "rltrain.train")
    assert processes["trainer-1"].env == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
