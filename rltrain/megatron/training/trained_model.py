"""A model with what trains it: gradient buffers, optimizer and schedule. Of the policy, or of the critic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from rltrain.arguments.config import Config
from rltrain.megatron.checkpoint.state import TrainState
from rltrain.megatron.device import HostSwap, device, megatron_scope
from rltrain.megatron.model.build import wrap_data_parallel
from rltrain.megatron.model.customize import freeze
from rltrain.megatron.model.optimizer import build_optimizer, build_scheduler, parts_of
from rltrain.megatron.training.loss import Sums


@dataclass(frozen=True)
class Update:
    """What came of one optimizer step."""

    grad_norm: float  # before clipping
    learning_rate: float
    not_finite: str | None = None  # "loss" or "gradient": the step was skipped, and why


class TrainedModel:
    """This rank's chunks of a model. Every method is called by all ranks together.

    Attributes:
        models: The bare chunks, which have the weights.
        wrapped: The same, each with Megatron-core's data parallelism round it, which is what runs.
        swap: Moves all of it to host memory and back, where there is a GPU.
        weights_swap: The same for the weights alone.
        state_swap: The same for all but the weights.
    """

    def __init__(self, models: list[GPTModel], config: Config) -> None:
        """Make a model that has its first weights ready to be trained with the flags in `args`."""
        self.models, self.config = models, config
        freeze(models, config.training)
        with megatron_scope():
            self.wrapped = wrap_data_parallel(models, config.parallel, config.model)
            self.optimizer = build_optimizer(self.wrapped, config)
            self.scheduler = build_scheduler(self.optimizer, config)
        # Moved before the first step, or after one that has cleared the gradients.
        self.swap = HostSwap(self._tensors, zeros=self._gradients)
        self.weights_swap = HostSwap(self._weights)
        self.state_swap = HostSwap(self._state, zeros=self._gradients)

    def state(self) -> TrainState:
        """What a checkpoint of it holds."""
        return TrainState(self.models) if self.config.checkpoint.no_save_optim else self.full_state()

    def full_state(self) -> TrainState:
        """Everything that a checkpoint can hold."""
        partly = bool(
            self.config.lora.lora_rank
            or self.config.training.only_train_params_name_list
            or self.config.training.freeze_params_name_list
        )
        return TrainState(self.models, self.optimizer, self.scheduler, partly)

    def update(self, sums: Sums) -> Update:
        """Update the weights with the accumulated gradients and clear these.

        If the loss, or a gradient, of any rank is infinite or no number, nothing is changed on any rank.

        Args:
            sums: Of this rank's micro-batches, with the loss.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]
        problem = self._not_finite(sums)
        with megatron_scope():
            grad_norm = 0.0
            if problem is None:
                _, norm, _ = self.optimizer.step()
                grad_norm = float(norm or 0.0)  # None without --clip-grad
                self.scheduler.step(increment=1)
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        return Update(grad_norm, learning_rate, problem)

    def forget_averages(self) -> None:
        """Let Adam start over, for --reset-optimizer-states."""
        for each in parts_of(self.optimizer):
            for group in each.optimizer.param_groups:
                if "step" in group:  # TransformerEngine's Adam counts here, torch's in the state
                    group["step"] = 0
            for state in each.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()

    def _not_finite(self, sums: Sums) -> str | None:
        """What is infinite or no number on any rank, or None."""
        losses = [value for name, value in sums.items() if name.endswith("loss")]
        gradients = list(self._gradients())
        # One pass over memory: a sum is finite only if everything in it is.
        flags = torch.stack([_any_not_finite(losses), _any_not_finite(gradients)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        loss, gradient = flags.tolist()
        return "loss" if loss else "gradient" if gradient else None

    def _buffers(self) -> list[Any]:
        """Megatron-core's gradient buffers."""
        return [
            buffer for chunk in self.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]

    def _weights(self) -> Iterator[Tensor]:
        """What is computed with."""
        yield from (parameter.data for model in self.models for parameter in model.parameters())
        yield from (buffer.param_data for buffer in self._buffers() if buffer.param_data is not None)

    def _state(self) -> Iterator[Tensor]:
        """The rest; where the optimizer works on the weights themselves, they are not part of it."""
        weights = {tensor.untyped_storage().data_ptr() for tensor in self._weights()}
        return (each for each in self._tensors() if each.untyped_storage().data_ptr() not in weights)

    def _gradients(self) -> Iterator[Tensor]:
        """Megatron-core's buffers of them, one number a parameter whatever ranks share the optimizer."""
        return (buffer.grad_data for buffer in self._buffers())

    def _tensors(self) -> Iterator[Tensor]:
        """Everything of it that takes memory on the device."""
        yield from self._weights()
        yield from self._gradients()
        for each in parts_of(self.optimizer):
            yield from (parameter.data for group in each.param_groups for parameter in group["params"])
            for state in each.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def _any_not_finite(tensors: list[Tensor]) -> Tensor:
    """A scalar, 1.0 or 0.0, on this rank's device."""
    sums = [tensor.detach().sum().float() for tensor in tensors]
    total = torch.stack(sums).sum() if sums else torch.zeros((), device=device())
    return (~total.isfinite()).float()
