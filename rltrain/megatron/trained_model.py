"""A model with what trains it: gradient buffers, optimizer and schedule. Of the policy, or of the critic."""

from __future__ import annotations

import argparse

from megatron.core.models.gpt import GPTModel

from rltrain.megatron.checkpoint import TrainState
from rltrain.megatron.device import megatron_scope
from rltrain.megatron.model import wrap_data_parallel
from rltrain.megatron.optimizer import build_optimizer, build_scheduler


class TrainedModel:
    """This rank's chunks of a model. Every method is called by all ranks together.

    Attributes:
        models: The bare chunks, which have the weights.
        wrapped: The same, each with Megatron-core's data parallelism round it, which is what runs.
    """

    def __init__(self, models: list[GPTModel], args: argparse.Namespace) -> None:
        """Make a model that has its first weights ready to be trained with the flags in `args`."""
        self.models, self._args = models, args
        with megatron_scope():
            self.wrapped = wrap_data_parallel(models, args)
            self.optimizer = build_optimizer(self.wrapped, args)
            self.scheduler = build_scheduler(self.optimizer, args)

    def state(self) -> TrainState:
        """What a checkpoint of it holds."""
        if self._args.no_save_optim:
            return TrainState(self.models)
        return self.full_state()

    def full_state(self) -> TrainState:
        """Everything that a checkpoint can hold."""
        return TrainState(self.models, self.optimizer, self.scheduler)

    def step(self) -> tuple[float, float]:
        """Update the weights with the accumulated gradients and clear these.

        Returns:
            The gradient's norm before clipping, and the learning rate that was used.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]
        with megatron_scope():
            succeeded, grad_norm, _ = self.optimizer.step()
            if not succeeded:
                raise RuntimeError("the optimizer refused the step: gradients are infinite or not a number")
            self.scheduler.step(increment=1)
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        return float(grad_norm), learning_rate
