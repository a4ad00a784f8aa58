"""Which network interface ranks use, and how a batch reaches them."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from helpers.megatron import make_config, run_ranks, tiny_config, write_config

from rltrain.arguments.config import Config
from rltrain.data.batch import TrainBatch
from rltrain.megatron.ranks import interface_of
from rltrain.schema import SCHEMA, TRAIN_COLUMNS


def test_interface_of_an_address() -> None:
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET:
                assert interface_of(each.address) == name
    assert interface_of("127.0.0.1") is not None
    assert interface_of("203.0.113.7") is None


def batch_table() -> pa.Table:
    """Two chunks, of which the second begins in the middle of its buffers."""
    rows = [
        {
            "tokens": [1, 2, 3, 4],
            "response_length": 2,
            "loss_mask": [0, 1],
            "rollout_log_probs": [-1.0, -2.0],
        },
        {"tokens": [5, 6, 7], "response_length": 1, "loss_mask": [1], "rollout_log_probs": [-3.0]},
        {"tokens": [], "response_length": 0, "loss_mask": [], "rollout_log_probs": None},
    ]
    full = [{"train_reward": float(i), **row} for i, row in enumerate(rows)]
    table = pa.Table.from_pylist(full, schema=SCHEMA).select(TRAIN_COLUMNS)
    return pa.concat_tables([table.slice(0, 1), table.slice(1)])


def receive(config: Config, work: Path) -> tuple[bool, dict[str, Any], list[int]]:
    """What `table_of_rank_0` gives this rank, while nothing may be pickled."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from rltrain.data.packing import plan_step
    from rltrain.megatron.ranks import control_group
    from rltrain.megatron.training.share import table_of_rank_0

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a batch was pickled")

    control_group()
    distributed_c10d._object_to_tensor = refuse
    table = table_of_rank_0(batch_table() if dist.get_rank() == 0 else None)
    batch = TrainBatch.from_arrow(table)
    plan = plan_step([len(tokens) for tokens in batch.tokens], 2, max_tokens=8, micro_batch_size=1)
    return table.equals(batch_table(), check_metadata=True), vars(batch), plan.micro_batches


@pytest.mark.slow
def test_ranks_get_the_same_batch_without_a_pickled_copy(tmp_path: Path) -> None:
    model_dir = write_config(tmp_path / "model", tiny_config())
    (equal, first, plan), (others_equal, second, others_plan) = run_ranks(
        receive, make_config(model_dir), tmp_path / "ranks"
    )
    assert equal and others_equal
    assert plan == others_plan
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_equal(second[name], values)
    assert [tokens.tolist() for tokens in second["tokens"]] == [[1, 2, 3, 4], [5, 6, 7], []]
