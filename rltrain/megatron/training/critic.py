"""PPO's critic: predicts the return of every token, and learns from how wrong it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from rltrain.algorithms.losses import clipped_value_loss, explained_variance
from rltrain.arguments.config import Config
from rltrain.arguments.hf_config import ModelShape
from rltrain.data.batch import Flat
from rltrain.megatron.checkpoint.load import load_checkpoint
from rltrain.megatron.checkpoint.resume import load_source, matching, resume, weight_source
from rltrain.megatron.checkpoint.save import SaveOptions, save_checkpoint
from rltrain.megatron.checkpoint.state import TrainState
from rltrain.megatron.device import device, megatron_scope
from rltrain.megatron.model.value_head import build_critic, copy_layers
from rltrain.megatron.training.forward_backward import forward_only, gather_own
from rltrain.megatron.training.loss import Sums
from rltrain.megatron.training.micro_batch import LossInputs, MicroBatch
from rltrain.megatron.training.share import RankShare
from rltrain.megatron.training.steps import train_steps
from rltrain.megatron.training.trained_model import TrainedModel, Update


class Critic:
    """The value model of one rank, with optimizer, schedule and checkpoints of its own.

    Attributes:
        trained: The model that is trained.
    """

    def __init__(self, config: Config, shape: ModelShape, policy: list[GPTModel]) -> None:
        """Build it, with the policy's present weights or those of --critic-load.

        Args:
            policy: A model that is not yet wrapped for data parallelism. A Hugging Face directory is read
                through it, so its weights are to be loaded after this.

        Raises:
            UserError: --critic-load holds no weights.
        """
        self._config = config.of_critic()
        with megatron_scope():
            models = build_critic(shape, self._config)
            if self._config.checkpoint.load is None:
                copy_layers(policy, models)
            else:
                source = weight_source(Path(self._config.checkpoint.load), "--critic-load", None)
                if source.checkpoint is not None:
                    load_checkpoint(source.checkpoint, TrainState(models), is_trained=False)
                else:
                    load_source(policy, shape, source, is_trained=False)
                    copy_layers(policy, models)
        self.trained = TrainedModel(models, self._config)
        if self._config.critic.swap_critic:
            self.trained.swap.out()

    @contextmanager
    def in_place_of(self, policy: TrainedModel) -> Iterator[None]:
        """While entered, the critic is on the GPU and the policy in host memory; otherwise the other way round."""
        if not self._config.critic.swap_critic:
            yield
            return
        policy.swap.out()
        self.trained.swap.back()
        try:
            yield
        finally:
            self.trained.swap.out()
            policy.swap.back()

    def resume(self, iteration: int) -> None:
        """Go on from the checkpoint that belongs to the policy's.

        Raises:
            UserError: there is none of that step.
        """
        if self._config.checkpoint.save and iteration:
            self.trained.swap.back()
            resume(
                self._config.checkpoint,
                self.trained.full_state(),
                matching(Path(self._config.checkpoint.save), iteration),
            )
            if self._config.critic.swap_critic:
                self.trained.swap.out()

    def save(self, iteration: int) -> None:
        """Write a checkpoint, if the run has any."""
        if self._config.checkpoint.save:
            options = SaveOptions.of_companion(self._config.checkpoint)
            save_checkpoint(Path(self._config.checkpoint.save), iteration, self.trained.state(), options)

    def values(self, share: RankShare) -> Flat:
        """V of the state before each trainable token of this rank's samples."""
        return share.per_token(
            lambda micro_batches: forward_only(
                self.trained.wrapped,
                micro_batches,
                lambda each, outputs: gather_own(each, outputs.flatten())[0],
            )
        )

    def train(
        self, share: RankShare, inputs: LossInputs[Flat], after: Callable[[int, Update], object]
    ) -> dict[str, float]:
        """Train on a rollout.

        Args:
            inputs: With `old_values` and `returns`.
            after: As for `train_steps`.

        Returns:
            Metrics, the same on every rank.
        """
        if self._config.training.reset_optimizer_states:
            self.trained.forget_averages()
        assert inputs.old_values is not None and inputs.returns is not None
        own = LossInputs(inputs.weights, old_values=inputs.old_values, returns=inputs.returns)
        metrics = train_steps(
            self.trained, share, own, value_loss(self._config.critic.value_clip), after=after
        )
        return metrics | prediction_metrics(share, inputs.old_values, inputs.returns)


def value_loss(value_clip: float) -> Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]]:
    """The clipped value loss of a critic's outputs, for `forward_backward`."""

    def loss(micro_batch: MicroBatch, outputs: Tensor) -> tuple[Tensor, Sums]:
        inputs = micro_batch.inputs
        assert inputs.old_values is not None and inputs.returns is not None
        (predicted,) = gather_own(micro_batch, outputs.flatten())
        result = clipped_value_loss(predicted, inputs.old_values, inputs.returns, value_clip=value_clip)
        total = result.loss @ inputs.weights
        return total, {"value_loss": total.detach(), "value_clipfrac": result.clipped @ inputs.weights}

    return loss


def prediction_metrics(share: RankShare, predicted: Flat, returns: Flat) -> dict[str, float]:
    """How well the critic knew the returns before it was trained on them, over all ranks' tokens."""
    empty = np.empty(0, np.float32)
    values = np.concatenate([empty, *(predicted[i] for i in share.samples)]).astype(np.float64)
    targets = np.concatenate([empty, *(returns[i] for i in share.samples)]).astype(np.float64)
    errors = targets - values
    own = [len(errors), errors.sum(), errors @ errors, targets.sum(), targets @ targets, values.sum()]
    sums = torch.tensor(own, dtype=torch.float64, device=device())
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    count, error, error_squares, target, target_squares, value = sums.tolist()
    return {
        "explained_variance": explained_variance(
            (count, error, error_squares), (count, target, target_squares)
        ),
        "value": value / max(1.0, count),
        "return": target / max(1.0, count),
    }
