"""For tests that run on a GPU, each with a variant for the CPU, so that nothing in them is first run on a GPU node."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine"),
]
# For `parametrize("where", …)`: on the CPU a test proves itself, on a GPU the machine.
EVERYWHERE = ["cpu", pytest.param("cuda", marks=needs_gpu)]
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": ""}


def environment(where: str) -> dict[str, str]:
    """What a new process needs to run there."""
    return CPU_ONLY if where == "cpu" else {}


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes, with all that it has the GPU do."""
    _synchronize()
    begun = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - begun


def report(figures: dict[str, float], unit: str) -> None:
    """Print what was measured."""
    for name, figure in figures.items():
        print(f"{name}: {figure:,.3g} {unit}")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
