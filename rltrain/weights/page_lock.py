"""Mapped memory that a GPU copies to and from directly.

Pages that the system may move or swap out are copied through a small buffer of the driver, at a fraction of the speed.
Memory that two processes share is locked by each of them. Without a GPU all this does nothing.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: for all GPUs of this process


def lock_pages(memory: Tensor) -> None:
    """Lock the pages of mapped memory; where the driver refuses, copies are slower and that is said.

    Memory that is locked has to be unlocked before it is unmapped.
    """
    if not torch.cuda.is_available() or not len(memory):
        return
    status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
    if status:
        _clear_error()
        print(
            f"weights: {memory.nbytes / 2**20:.0f} MiB of shared memory can't be page-locked (CUDA error {status}):"
            " copies between it and the GPU are slower",
            flush=True,
        )


def unlock_pages(memory: Tensor) -> None:
    """Unlock what `lock_pages` has locked; no copy may be under way."""
    if not torch.cuda.is_available() or not len(memory):
        return
    if int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())):
        _clear_error()  # it was not locked


def _clear_error() -> None:
    # CUDA keeps the error, and torch would raise it after the next kernel, whoever starts that.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
