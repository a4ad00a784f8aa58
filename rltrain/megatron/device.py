"""The one place that decides whether the trainer runs on CUDA or on the CPU."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # to be imported only after `set_up`
    from megatron.core.transformer.transformer_config import TransformerConfig


def use_cuda() -> bool:
    """Whether this machine's trainer runs on CUDA."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda() else torch.device("cpu")


def backend(requested: str | None) -> str:
    """torch.distributed's backend: the one asked for, else NCCL on CUDA and gloo on the CPU."""
    return requested or ("nccl" if use_cuda() else "gloo")


def set_up() -> None:
    """Choose this rank's GPU, or make Megatron-core run on the CPU. Call before Megatron-core is imported."""
    if use_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return
    if "OMP_NUM_THREADS" not in os.environ:
        # Every rank would start a thread a core, and more threads than cores wait for each other.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    from rltrain.megatron import cpu

    cpu.install()


def model_scope(config: TransformerConfig) -> AbstractContextManager[object]:
    """Enter it, inside `megatron_scope`, round a model's forward pass.

    Dense models name no CUDA device in there, so on the CPU the translation, which costs a Python call for every
    torch function, is switched off.
    """
    return nullcontext() if use_cuda() or config.num_moe_experts else torch._C.DisableTorchFunction()


def megatron_scope() -> AbstractContextManager[object]:
    """Enter it round every call into Megatron-core; it does nothing on CUDA."""
    if use_cuda():
        return nullcontext()
    from rltrain.megatron.cpu import CudaNamesMeanCpu

    return CudaNamesMeanCpu()
