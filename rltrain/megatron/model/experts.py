"""Linear layers of all experts of a rank, in plain torch, for machines without TransformerEngine.

Named and laid out as TransformerEngine's grouped linear layers: `weight0`, `weight1` … of this rank's experts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor
from torch.autograd.function import once_differentiable


def has_grouped_product(x: Tensor, weight: Tensor) -> bool:
    """Whether a GPU multiplies the tokens of all experts at once: in bf16, with rows of whole 16 bytes."""
    whole = not any(size % 8 for size in weight.shape)
    return x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and whole and len(x) > 0


class _GroupedLinear(torch.autograd.Function):
    """One call of `grouped_mm` for all experts. The weights lie together only while it runs: a copy of each layer's,
    kept for the backward pass, would double them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, ends, *weights)
        return F.grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, ends, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        of_x = F.grouped_mm(grad, torch.stack(weights), offs=ends) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return (of_x, None, *(None for _ in weights))
        return (of_x, None, *F.grouped_mm(grad.t(), x, offs=ends).unbind())


def grouped_linear(x: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
    """Each expert's product of its tokens, [tokens, output]; tokens are sorted by expert."""
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32).to(x.device, non_blocking=True)
    return cast(Tensor, _GroupedLinear.apply(x, ends, *weights))


class GroupedLinear(torch.nn.Module):
    """One weight an expert, split along `split_dim` over expert tensor parallel ranks; or whole, with a bias."""

    split_dim: ClassVar[int]

    def __init__(
        self,
        num_experts: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,  # of Megatron-core's interface: names of communication buffers and the like
    ) -> None:
        super().__init__()
        if bias and pg_collection.expt_tp.size() > 1:
            raise NotImplementedError("biases of experts that are split")
        self.config, self.num_experts, self._groups = config, num_experts, pg_collection
        self.skip_bias_add = skip_bias_add
        shape = [output_size, input_size]
        whole = torch.Size(shape)
        shape[self.split_dim] = divide(shape[self.split_dim], pg_collection.expt_tp.size())
        device = torch.device("cpu" if config.use_cpu_initialization else "cuda")
        for i in range(num_experts):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
            self._register(f"weight{i}", weight, self.split_dim)
        for i in range(num_experts if bias else 0):
            zeros = torch.zeros(output_size, dtype=config.params_dtype, device=device)
            self._register(f"bias{i}", torch.nn.Parameter(zeros), 0)
        self._initialize(init_method, whole)

    def _register(self, name: str, weight: torch.nn.Parameter, split_dim: int) -> None:
        self.register_parameter(name, weight)
        # How Megatron-core tells how it is split; which ranks hold the same is said where the model is built.
        weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        weight.partition_dim, weight.partition_stride = split_dim, 1  # type: ignore[attr-defined]

    def _own(self, kind: str) -> list[Tensor]:
        """Weights or biases of this rank's experts."""
        return [weight for name, weight in self.named_parameters() if name.startswith(kind)]

    def forward(self, x: Tensor, counts: list[int]) -> tuple[Tensor, list[Tensor] | None]:
        """The output for tokens sorted by expert, and biases that are not in it; `counts[i]` tokens are expert i's."""
        weights, biases = self._own("weight"), self._own("bias")
        if has_grouped_product(x, weights[0]):
            output = grouped_linear(x, counts, *weights)
        else:
            parts = zip(x.split(counts), weights, strict=True)
            output = torch.cat([F.linear(tokens, weight) for tokens, weight in parts])
        if not biases or self.skip_bias_add:
            return output, biases or None
        with_bias = zip(output.split(counts), biases, strict=True)
        return torch.cat([part + bias for part, bias in with_bias]), None

    def backward_dw(self) -> None:
        """Gradients of weights are not put off."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """For checkpoints: all experts of the layer as one tensor, whatever ranks hold them."""
        assert metadata is not None
        first, axis = self._groups.ep.rank() * self.num_experts, len(sharded_offsets)
        total = self._groups.ep.size() * self.num_experts
        result = {}
        numbered = [(kind, *each) for kind in ("weight", "bias") for each in enumerate(self._own(kind))]
        for kind, i, weight in numbered:
            (sharded,) = make_sharded_tensors_for_checkpoint(
                {kind: weight},
                prefix,
                {kind: self.split_dim} if kind == "weight" else {},
                (*sharded_offsets, (axis, first + i, total)),
                tp_group=self._groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            ).values()
            sharded.replica_id = (*sharded.replica_id[:2], self._groups.expt_dp.rank())
            result[f"{prefix}{kind}{i}"] = sharded
        return result

    def _initialize(self, init_method: Callable[[Tensor], Any], whole: torch.Size) -> None:
        """Random weights; on the CPU the same however the experts are shared out."""
        if not self.config.use_cpu_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for weight in self._own("weight"):
                    init_method(weight)
            return
        size, rank = self._groups.expt_tp.size(), self._groups.expt_tp.rank()
        first, experts = self._groups.ep.rank() * self.num_experts, self._own("weight")
        for expert in range(self._groups.ep.size() * self.num_experts):
            master = torch.empty(whole, dtype=torch.float32)
            init_method(master)
            if first <= expert < first + self.num_experts:
                experts[expert - first].data.copy_(master.chunk(size, self.split_dim)[rank])


class ColumnGroupedLinear(GroupedLinear):
    """Split by output."""

    split_dim = 0


class RowGroupedLinear(GroupedLinear):
    """Split by input."""

    split_dim = 1
