"""The one place that decides whether the trainer runs on CUDA or on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rltrain.run.errors import UserError

# Dense bf16 FLOP/s of GPUs, from NVIDIA's data sheets (without sparsity).
_PEAK_FLOPS = {
    "B200": 2.25e15, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "H800": 989e12, "H20": 148e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "A10": 125e12, "L4": 121e12,
}  # fmt: skip
_PEAK_FLOPS_OF_CARDS = {("H100", "PCIe"): 756e12, ("H100", "NVL"): 835e12, ("H200", "NVL"): 835e12}

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
    _choose()
    from rltrain.megatron import repairs

    repairs.install()


def _choose() -> None:
    # Kernels then start in the order of their launch, which the overlap of tensor parallelism counts on (Megatron-LM).
    # CUDA reads it once, when it is first used.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if use_cuda():
        torch.cuda.set_device(own_device(os.environ, torch.cuda.device_count()))
        return
    if "OMP_NUM_THREADS" not in os.environ:
        # Every rank would start a thread a core, and more threads than cores wait for each other.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    from rltrain.megatron import cpu

    cpu.install()


def own_device(env: Mapping[str, str], visible: int) -> int:
    """The device of this rank, of `visible` ones: its local rank, or the only one, where each rank sees just its own.

    Raises:
        UserError: this machine's ranks are more than the devices that they see.
    """
    rank, ranks = int(env.get("LOCAL_RANK", "0")), int(env.get("LOCAL_WORLD_SIZE", "1"))
    if visible >= ranks:
        return rank
    if visible == 1:
        return 0
    raise UserError(
        f"{ranks} trainer ranks on this machine, but only {visible} visible GPUs"
        f" (CUDA_VISIBLE_DEVICES={env.get('CUDA_VISIBLE_DEVICES', 'unset')}): each rank needs one GPU."
    )


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


def peak_flops() -> float | None:
    """bf16 FLOP/s that this rank's GPU can do at most; None where that is not known."""
    if not use_cuda():
        return None
    return peak_flops_of(torch.cuda.get_device_name())


def peak_flops_of(name: str) -> float | None:
    """bf16 FLOP/s of a GPU by the name that CUDA gives it; None if it is not known. Cards have less than modules."""
    words = name.replace("-", " ").split()
    for (chip, form), flops in _PEAK_FLOPS_OF_CARDS.items():
        if chip in words and form in words:
            return flops
    return next((_PEAK_FLOPS[word] for word in words if word in _PEAK_FLOPS), None)


def reset_peak_memory() -> None:
    """Begin to measure afresh; on the CPU the system only knows the peak of the process's whole life."""
    if use_cuda():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Bytes: the most that torch has held on the GPU, or that this process has held on the CPU."""
    if use_cuda():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def used_memory() -> int:
    """Bytes in use now: on this rank's GPU, by whomever, or by this process on the CPU."""
    if use_cuda():
        free, total = torch.cuda.mem_get_info()
        return total - free
    import psutil

    return psutil.Process().memory_info().rss


class HostSwap:
    """Moves the memory of tensors between GPU and host, in place: every view of it stays what it was.

    On the CPU there is nothing to move, and both calls only keep track.
    """

    def __init__(
        self, tensors: Callable[[], Iterable[Tensor]], zeros: Callable[[], Iterable[Tensor]] = tuple
    ) -> None:
        """Both are asked for at every `out`, because an optimizer makes its state late.

        Args:
            zeros: Those in which there are only zeros by then: no host memory is taken for them.
        """
        self._tensors, self._zeros = tensors, zeros
        self._stored: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._released: list[tuple[torch.UntypedStorage, int]] = []
        self._pinned: dict[int, list[Tensor]] = {}  # by size: kept, as pinning costs more than the copy
        self.is_out = False

    def out(self) -> None:
        """To the host; no tensor may be used until `back`."""
        if not self.is_out and use_cuda():
            self._released = release(self._zeros())
            self._stored = store(self._tensors(), self._pinned)
            torch.cuda.empty_cache()
        self.is_out = True

    def back(self) -> None:
        """To the GPU again."""
        restore(self._stored)
        refill(self._released)
        for _, held in self._stored:
            self._pinned.setdefault(held.numel(), []).append(held)
        self._stored, self._released, self.is_out = [], [], False


def store(
    tensors: Iterable[Tensor], free: dict[int, list[Tensor]] | None = None
) -> list[tuple[torch.UntypedStorage, Tensor]]:
    """Copy the memory of tensors to the host and release it. For `restore`.

    `free` is host memory by its size (uint8), of which what fits is taken.

    Returns:
        Each storage, once however many tensors share it, with its bytes.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    stored = []
    for storage in storages.values():
        size = storage.nbytes()
        if not size or (storage.device.type == "cpu" and use_cuda()):
            continue  # Adam's step counters are on the host already
        kept = (free or {}).get(size)
        held = kept.pop() if kept else torch.empty(size, dtype=torch.uint8, pin_memory=use_cuda())
        held.copy_(_bytes(storage))
        storage.resize_(0)
        stored.append((storage, held))
    return stored


def restore(stored: list[tuple[torch.UntypedStorage, Tensor]]) -> None:
    """Give storages their memory and what was in it back."""
    for storage, held in stored:
        storage.resize_(held.numel())
        _bytes(storage).copy_(held)


def release(zeros: Iterable[Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """Release the memory of tensors that are zero. For `refill`; `store` then passes them over.

    Returns:
        Each storage, once however many tensors share it, with its size in bytes.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in zeros}
    released = [(storage, storage.nbytes()) for storage in storages.values() if storage.nbytes()]
    for storage, _ in released:
        storage.resize_(0)
    return released


def refill(released: list[tuple[torch.UntypedStorage, int]]) -> None:
    """Give storages their memory back, and zeros in it."""
    for storage, size in released:
        storage.resize_(size)
        _bytes(storage).zero_()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
