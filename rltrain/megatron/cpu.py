"""Lets Megatron-core run on a machine without CUDA. Never active where there is one.

Megatron-core names CUDA in three ways, and each has its answer here:

- it calls functions of `torch.cuda` without asking whether there is a device: `install` puts stand-ins there;
- it creates tensors with `device="cuda"` and compares `tensor.type()` with CUDA's names: the function mode
  `CudaNamesMeanCpu` translates both, for the time that it is entered;
- some of its own functions assume CUDA's generators or NCCL's uneven collectives: `install` replaces them.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class CudaNamesMeanCpu(TorchFunctionMode):
    """Maps `device="cuda"`, `.cuda()`, pinned memory and type names of CUDA tensors to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called instead of every torch function while the mode is entered, so it is kept short."""
        if func is torch.Tensor.cuda:
            return args[0]
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

    if torch.cuda.is_available():
        raise RuntimeError("the CPU adaptor must not be installed where CUDA is available")
    # A dozen warnings that kernels for GPUs are not installed, and torch's about Megatron-core's use of it.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed|rltrain\.megatron\.cpu"
    )
    _stub_torch_cuda()
    _replace_rng()
    _replace_dispatching()
    _replace_fusions()


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


def _replace_dispatching() -> None:
    """Tokens reach their experts: gloo gathers only parts of equal size.

    Megatron-core brings split sizes to the CPU only if they are not there. Calling this again changes nothing.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    if hasattr(mappings, "_slurmlime_fixed"):
        return
    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(
        own: Tensor, group: dist.ProcessGroup, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(own, group, output_split_sizes, use_global_buffer)
        most = max(1, *output_split_sizes)
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: own.shape[0]] = own
        parts = own.new_empty((group.size() * most, *own.shape[1:]))
        dist.all_gather_into_tensor(parts, padded, group=group)
        return torch.cat(
            [part[:size] for part, size in zip(parts.split(most), output_split_sizes, strict=True)]
        )

    def scatter_any(
        whole: Tensor,
        group: dist.ProcessGroup,
        input_split_sizes: Any = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter(whole, group, input_split_sizes, use_global_buffer)
        total = whole.clone()
        dist.all_reduce(total, group=group)
        return total.split(list(input_split_sizes))[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_any, scatter_any
    mappings._slurmlime_fixed = True


def _replace_fusions() -> None:
    """Kernels that save passes over memory: gradients that are added where they are kept, and SwiGLU in one.

    The first are an extension of Apex's, for CUDA alone; the other is compiled, which takes longer than it saves here.
    """
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import mlp

    layers.fused_weight_gradient_mlp_cuda = WeightGradients
    layers._grad_accum_fusion_available = True
    mlp.bias_swiglu_impl = _swiglu


class WeightGradients:
    """What Megatron-core's linear layers call to add a product of matrices to a weight's gradient."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, gradient: Tensor, total: Tensor) -> None:
        """Add gradientᵀ · inputs, [outputs, inputs] of [tokens, outputs] and [tokens, inputs], to an fp32 total."""
        if inputs.dtype == total.dtype:
            total.addmm_(gradient.t(), inputs)
        else:
            total.add_(gradient.t().matmul(inputs))

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32  # the same, for totals of 16 bits


def _swiglu(x: Tensor, bias: Tensor | None, *of_other_devices: bool) -> Tensor:
    from rltrain.megatron.model.layers import cpu_kernels

    x = x if bias is None else x + bias
    if cpu_kernels.has_kernels(x):
        return cpu_kernels.swiglu(x)
    gate, linear = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * linear


def _split_sizes(sizes: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The sizes as collectives take them; the original leaves tensors of the CPU as they are."""
    return sizes.numpy() if as_numpy and isinstance(sizes, Tensor) else sizes
