"""Lets the unmodified SGLang run on a machine without a GPU; does nothing on a machine with one.

SGLang imports triton, torchvision and sgl_kernel at module level, although a dense text model on the CPU
calls nothing in them, and their wheels are large or linked to CUDA. Each that is not installed gets an
import-only stand-in, so call `install()` before the first `import sglang`, in every process.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CANDIDATES = ("triton", "torchvision", "sgl_kernel")


def has_accelerator() -> bool:
    """Whether torch can reach a GPU here."""
    import torch

    return torch.cuda.is_available()


def install() -> None:
    """Put stand-ins for the missing packages on the import path. Idempotent; a no-op beside a GPU."""
    if any(isinstance(finder, _StandInFinder) for finder in sys.meta_path):
        return
    missing = frozenset(name for name in _CANDIDATES if importlib.util.find_spec(name) is None)
    if not missing or has_accelerator():
        return
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    _let_libraries_notice_what_is_missing()
    sys.meta_path.append(_StandInFinder(missing))


def _let_libraries_notice_what_is_missing() -> None:
    """torch and transformers cache whether a package exists: they have to look before it seems to."""
    import torch.utils._triton
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
