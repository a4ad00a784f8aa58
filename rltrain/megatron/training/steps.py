"""The optimizer steps of one rollout, of the policy or of the critic, and what is done with one that is skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from rltrain.data.batch import Flat
from rltrain.megatron.ranks import on_last_stage
from rltrain.megatron.training.forward_backward import forward_backward
from rltrain.megatron.training.loss import Sums, step_metrics
from rltrain.megatron.training.micro_batch import LossInputs, MicroBatch
from rltrain.megatron.training.share import RankShare
from rltrain.megatron.training.trained_model import TrainedModel, Update
from rltrain.run.errors import UserError


def train_steps(
    trained: TrainedModel,
    share: RankShare,
    inputs: LossInputs[Flat],
    loss: Callable[[MicroBatch, Tensor], tuple[Tensor, Sums]],
    *,
    before: Callable[[int], object] = lambda step: None,
    after: Callable[[int, Update], object],
) -> dict[str, float]:
    """Train on this rank's share of a rollout, --num-steps-per-rollout optimizer steps.

    Args:
        inputs: What `loss` needs for each trainable token.
        loss: As for `forward_backward`.
        before: Called with the number of each step before it.
        after: Called with the number of each step and what came of it; may raise to stop.

    Returns:
        Metrics over the whole rollout, the same on every rank; means over the steps that were not skipped.
    """
    sums: list[Sums] = []
    updates: list[Update] = []
    for step in range(share.num_steps):
        before(step)
        if step == 1:  # after the first step the weights are not those that sampled: nothing to compare
            inputs = replace(inputs, compared_log_probs=None)
        sums.append(forward_backward(trained.wrapped, share.micro_batches(step, inputs), loss))
        updates.append(trained.update(sums[-1]))
        after(step, updates[-1])
    good = [i for i, update in enumerate(updates) if update.not_finite is None]
    group = parallel_state.get_data_parallel_group()
    metrics = on_last_stage(lambda: step_metrics([sums[i] for i in good], group))
    if good:
        metrics["grad_norm"] = sum(updates[i].grad_norm for i in good) / len(good)
    metrics["lr"] = updates[-1].learning_rate
    metrics["skipped_steps"] = float(len(updates) - len(good))
    return metrics


class SkippedSteps:
    """Says which steps were skipped, and stops the run when too many were, one after the other."""

    def __init__(self, limit: int, event: Callable[..., object], save: Callable[[int], object]) -> None:
        """Count up to --max-skipped-steps.

        Args:
            event: Appends to the run's events.
            save: Writes a checkpoint, of the state after a rollout with this number.
        """
        self._limit, self._event, self._save = limit, event, save
        self._in_a_row: dict[str, int] = {}

    def record(self, what: str, rollout_id: int, step: int, update: Update) -> None:
        """Note what came of a step.

        Args:
            what: `actor` or `critic`.

        Raises:
            UserError: too many in a row; the last good state is in a checkpoint.
        """
        if update.not_finite is None:
            self._in_a_row[what] = 0
            return
        self._in_a_row[what] = count = self._in_a_row.get(what, 0) + 1
        self._event(
            "step_skipped", step=rollout_id, optimizer_step=step, model=what, not_finite=update.not_finite
        )
        if count < self._limit:
            return
        saved = self._save(rollout_id - 1)
        raise UserError(
            f"rollout {rollout_id}, optimizer step {step}: the {what}'s {update.not_finite} is infinite or not a"
            f" number, as it was in all of the last {count} steps (--max-skipped-steps). The weights before"
            f" them are {f'saved in {saved}' if saved else 'lost, because there is no --save'}. Look at"
            " train/grad_norm and the rewards before that; a smaller --lr or --clip-grad may help."
        )


def prefixed(prefix: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with `prefix/` before their names."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
