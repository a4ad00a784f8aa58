"""Processes that share a CPU must not each start a thread a core: they would wait for each other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ENGINE = """
from rltrain.sglang import cpu, server
cpu.has_accelerator()  # loads torch, and OpenMP with it, before the variables are set
server.set_cpu_environment({})
import torch; print(torch.get_num_threads())
"""
TRAINER = "from rltrain.megatron import device; device.set_up(); import torch; print(torch.get_num_threads())"


def threads(code: str, **variables: str) -> int:
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**env, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(answer.stdout)


@pytest.mark.slow
def test_an_engine_uses_one_thread_unless_told_otherwise() -> None:
    assert threads(ENGINE) == 1
    assert threads(ENGINE, OMP_NUM_THREADS="2") == 2


@pytest.mark.slow
def test_trainer_ranks_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads(TRAINER, LOCAL_WORLD_SIZE="1") == cores
    assert threads(TRAINER, LOCAL_WORLD_SIZE=str(cores)) == 1
    assert threads(TRAINER, LOCAL_WORLD_SIZE="1", OMP_NUM_THREADS="1") == 1
