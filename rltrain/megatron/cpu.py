"""Lets Megatron-core 0.16 run on a machine without CUDA. Never active where there is one.

Megatron-core names CUDA in three ways, and each has its answer here:

- it calls functions of `torch.cuda` without asking whether there is a device: `install` puts stand-ins there;
- it creates tensors with `device="cuda"` and compares `tensor.type()` with CUDA's names: the function mode
  `CudaNamesMeanCpu` translates both, for the time that it is entered;
- some of its own functions assume CUDA's generators, a process that outlives us, or a fused kernel that is
  not there: `install` replaces them.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class CudaNamesMeanCpu(TorchFunctionMode):
    """Maps `device="cuda"`, `.cuda()`, pinned memory and type names of CUDA tensors to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called instead of every torch function while the mode is entered, so it is kept short."""
        if kwargs:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = _CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1:
            # The optimizers sort parameters by names such as "torch.cuda.FloatTensor".
            # (With the mode entered twice, the name comes back translated already.)
            return re.sub(r"^torch\.(?!cuda\.)", "torch.cuda.", func(*args))
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args)


class _Event:
    """CUDA orders work with events; on the CPU everything is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    record = wait = synchronize = _nothing


class _Stream(_Event):
    wait_stream = wait_event = _Event._nothing

    def record_event(self, *args: Any) -> _Event:
        return _Event()


def install() -> None:
    """Make Megatron-core importable and usable on the CPU. Calling it again changes nothing."""
    from rltrain.megatron.cpu_adam import fix_checkpointing
    from rltrain.megatron.cpu_experts import replace_dispatching

    if torch.cuda.is_available():
        raise RuntimeError("the CPU adaptor must not be installed where CUDA is available")
    # A dozen warnings that kernels for GPUs are not installed, and torch's about Megatron-core's use of it.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed|rltrain\.megatron\.cpu"
    )
    _stub_torch_cuda()
    _replace_rng()
    _replace_rope()
    replace_dispatching()
    fix_checkpointing()


def _stub_torch_cuda() -> None:
    stubs: dict[str, Any] = {
        "current_device": lambda: _CPU,  # buffers and RoPE are created on "the current device"
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        # Classes must stay classes: libraries write `torch.cuda.Stream | None` in annotations.
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args, **kwargs: _Stream(),
        "default_stream": lambda *args, **kwargs: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, stub in stubs.items():
        setattr(torch.cuda, name, stub)


def _replace_rng() -> None:
    """Dropout and initialisation draw from the CPU's generator, which stands in for CUDA's."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(self: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        # The original warns that the CPU's state changed, which is the point here.
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    random.CudaRNGStatesTracker.fork = fork


def _replace_rope() -> None:
    """Rotary embeddings of packed sequences by one lookup of each token's position.

    The original slices the frequencies once a sequence in every layer: a tenth of a step of short sequences.
    """
    from megatron.core.models.common.embeddings import rope_utils

    from rltrain.megatron.context_parallel import positions_in_sequence

    def apply_thd(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *, cp_group: Any, **options: Any) -> Tensor:
        positions = positions_in_sequence(cu_seqlens, cp_group.size(), cp_group.rank())
        return rope_utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs[positions], **options).squeeze(1)

    rope_utils._apply_rotary_pos_emb_thd = apply_thd
