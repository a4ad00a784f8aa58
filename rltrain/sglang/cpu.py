"""Lets the unmodified SGLang run, and sample by seeds, on a machine without a GPU; does nothing on a machine with one.

SGLang imports triton, torchvision and sgl_kernel at module level, although a dense text model on the CPU
calls nothing in them, and their wheels are large or linked to CUDA. Each package that is not installed, or that
can't be imported because it is linked to CUDA, gets an import-only stand-in, so call `install()` before the first
`import sglang`, in every process.

SGLang honours a request's `sampling_seed` only with `enable_deterministic_inference`, which it offers with
CUDA kernels. On the CPU `allow_deterministic_sampling()` makes it work, so that a run can be repeated token for token:
for the `torch_native` backend only the seeded sampler matters. It admits the backend, leaves out the batch-invariant
Triton kernels, and gives in torch the hash that the sampler takes from sgl_kernel.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_LINKED_TO_CUDA = "sgl_kernel"
_CANDIDATES = ("triton", "torchvision", _LINKED_TO_CUDA)
_MASK = 0xFFFFFFFF  # of 32 bits


def has_accelerator() -> bool:
    """Whether torch can reach a GPU here."""
    return torch.cuda.is_available()


def install() -> None:
    """Put stand-ins for packages that can't be used on the import path. Idempotent; a no-op beside a GPU."""
    if has_accelerator() or any(isinstance(finder, _StandInFinder) for finder in sys.meta_path):
        return
    # Without it SGLang, finding no GPU of NVIDIA, looks for kernels of other makers, and for vllm.
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    if torch.version.cuda is not None:
        _do_not_reach_for_cuda()
    missing = frozenset(name for name in _CANDIDATES if not _is_usable(name))
    if not missing:
        return
    _let_libraries_notice_what_is_missing()
    sys.meta_path.insert(0, _StandInFinder(missing))  # before what is installed and can't be imported


def _do_not_reach_for_cuda() -> None:
    """What a CPU build of torch does by itself; a build for CUDA takes its parts for those of this machine."""
    # Ranks of an engine would speak through its NCCL; SGLang does without where that can't be loaded.
    os.environ.setdefault("SGLANG_NCCL_SO_PATH", "no-nccl-without-a-gpu")
    of_device = torch.get_device_module

    @functools.cache
    def cpu_unless_told(device: torch.device | str | None = None) -> ModuleType:
        return of_device("cpu" if device is None else device)

    torch.get_device_module = cpu_unless_told


def _is_usable(name: str) -> bool:
    """Whether it is installed, and, if it is linked to CUDA, can be imported here."""
    if importlib.util.find_spec(name) is None:
        return False
    if name != _LINKED_TO_CUDA:
        return True
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        for module in [each for each in sys.modules if each.partition(".")[0] == name]:
            del sys.modules[module]  # what was imported before it failed
        return False
    return True


def _let_libraries_notice_what_is_missing() -> None:
    """torch and transformers cache whether a package exists: they have to look before it seems to."""
    import torch.utils._triton

    from rltrain.packages import quick_distributions

    with quick_distributions():
        from transformers.utils import import_utils

    torch.utils._triton.has_triton_package()
    for name in ("is_torchvision_available", "is_triton_available"):
        probe = getattr(import_utils, name, None)
        if probe is not None:
            probe()


class _StandInBase:
    """Base of every class found in a stand-in: can be subclassed and made, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _StandIn(ModuleType):
    """A module whose attributes exist on demand: capitalised names as classes, others as submodules."""

    __version__ = "3.0.0"  # high enough for the version checks

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper() or name in ("dtype", "constexpr", "tensor"):
            value: Any = type(name, (_StandInBase,), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.__name__.startswith("triton"):
            raise RuntimeError(f"{self.__name__} was called, but is only a stand-in for a missing package")
        if len(args) == 1 and callable(args[0]) and not kwargs:  # @triton.jit
            return args[0]
        return lambda function: function  # @triton.autotune(...)

    def __bool__(self) -> bool:
        return False


class _StandInFinder(MetaPathFinder, Loader):
    """Imports any submodule of the missing packages as a stand-in."""

    def __init__(self, missing: frozenset[str]) -> None:
        self._missing = missing

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] in self._missing:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "triton":  # the two helpers that are called while modules load
            module.cdiv = lambda a, b: -(a // -b)  # type: ignore[attr-defined]
            module.next_power_of_2 = lambda n: 1 << (n - 1).bit_length() if n > 0 else 1  # type: ignore[attr-defined]


def sleep_while_paused() -> None:
    """Have a paused scheduler wait for requests as an idle one does (`sleep_on_idle`).

    It would ask for them without end, on a core that the server and the trainer need for a push.
    """
    from sglang.srt.managers.scheduler import Scheduler

    ingest = Scheduler.ingest_requests

    @functools.wraps(ingest)
    def wait_and_ingest(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._engine_paused:
            self.maybe_sleep_on_idle()
        return ingest(self, *args, **kwargs)

    Scheduler.ingest_requests = wait_and_ingest


def allow_returned_routes() -> None:
    """Make `enable_return_routed_experts` work: SGLang would have CUDA pin the memory that it keeps the routes in."""
    from sglang.srt.mem_cache.pool_host import common

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, **_: Any) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate


def allow_deterministic_sampling() -> None:
    """Make `enable_deterministic_inference` work with `attention_backend="torch_native"`; idempotent."""
    from sglang.srt import batch_invariant_ops
    from sglang.srt.server_args import add_deterministic_attention_backend_choices

    add_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda *args, **kwargs: None
    _register_hash()


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bit) of (seed, position, column): uint32 of shape [len(seed), len(columns)].

    `seed` (64 bits) and `positions` have one entry a request; `columns` are token ids.
    """
    seed = seed.view(torch.int64)
    state = torch.zeros_like(seed)
    for word in (seed & _MASK, (seed >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        state = _mix(state, word)
    state = _mix(state[:, None], (columns.to(torch.int64) & _MASK)[None, :]) ^ 16  # 16 bytes were hashed
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _MASK
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _MASK
    return (state ^ (state >> 16)).to(torch.uint32)


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = (word * 0xCC9E2D51) & _MASK
    word = ((word << 15) | (word >> 17)) & _MASK
    state = state ^ ((word * 0x1B873593) & _MASK)
    state = ((state << 13) | (state >> 19)) & _MASK
    return (state * 5 + 0xE6546B64) & _MASK


@functools.cache
def _register_hash() -> torch.library.Library:
    """Returned (and so kept by the cache): the operator lives as long as its library object."""
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CompositeExplicitAutograd")

    @torch.library.register_fake("sgl_kernel::murmur_hash32_cpu", lib=library)
    def _(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
        return torch.empty((seed.shape[0], col_indices.shape[0]), dtype=torch.uint32)

    return library
