"""Processes that share a CPU must not each start a thread a core: they would wait for each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rltrain.sglang.engine import cpu_threads

ENGINE = """
from rltrain.sglang import cpu, server
cpu.has_accelerator()  # loads torch, and OpenMP with it, before the variables are set
server.set_cpu_environment({}, THREADS)
import torch; print(torch.get_num_threads())
"""
TRAINER = """
import os, torch
from rltrain.megatron import device
for ranks in RANKS:
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    device.set_up()
    print(torch.get_num_threads())
"""


def threads(code: str, **variables: str) -> list[int]:
    """The numbers that a process prints."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**env, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in answer.stdout.split()]


@pytest.mark.slow
def test_an_engine_uses_the_threads_that_it_is_told_to() -> None:
    assert threads(ENGINE.replace("THREADS", "None")) == [1]
    assert threads(ENGINE.replace("THREADS", "3")) == [3]
    assert threads(ENGINE.replace("THREADS", "3"), OMP_NUM_THREADS="2") == [2]


def test_engines_have_all_cores_where_the_trainer_waits_for_them(make_args, tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))

    def per_rank(hf_config: dict[str, Any], *flags: str) -> int:
        (tmp_path / "config.json").write_text(json.dumps(hf_config))
        return cpu_threads(make_args(*flags), {"model_path": str(tmp_path)})

    large = {"hidden_size": 576}
    assert per_rank(large) == cores
    assert per_rank({"text_config": large}) == cores
    assert per_rank(large, "--rollout-num-gpus", str(cores)) == 1
    assert per_rank(large, "--max-staleness", "1") == 1  # the trainer trains meanwhile
    assert per_rank({"hidden_size": 64}) == 1


@pytest.mark.slow
def test_trainer_ranks_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    # The same process twice: Megatron-core, which `set_up` imports, takes seconds.
    assert threads(TRAINER.replace("RANKS", str((1, cores)))) == [cores, 1]
    assert threads(TRAINER.replace("RANKS", "[1]"), OMP_NUM_THREADS="1") == [1]
