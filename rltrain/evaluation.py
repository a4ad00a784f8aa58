"""Evaluations beside training: when one is due, begun and ended."""

from __future__ import annotations

import time
from collections.abc import Callable

from rltrain.arguments.config import Config
from rltrain.job import NOBODY, Job, Newcomers
from rltrain.run.timing import Timers


class Evaluation:
    """At most one evaluation, of the weights that the engines have: it must end before they get others."""

    def __init__(
        self, job: Job, config: Config, validate: Callable[[], dict[str, float]] | None = None
    ) -> None:
        """`validate` evaluates the trainer's own weights, where there are no engines; all ranks call it together."""
        self._job, self._config, self._validate = job, config, validate
        # Requests of one batch change each other's tokens, even with deterministic engines.
        self._is_alone = bool(config.engines.sglang.get("enable_deterministic_inference"))
        self._trained: int | None = None

    def begin_if_owed(self, first: int) -> None:
        """Evaluate the weights that an attempt begins with, unless that is not due or has been done."""
        if owes_evaluation(self._config, first) and not self._job.has_evaluated(first):
            self.begin(first)

    def is_due_after(self, rollout_id: int) -> bool:
        """Whether the weights after this rollout are to be evaluated: every so often, and at the end."""
        interval = self._config.evaluation.eval_interval
        last = rollout_id + 1 == self._config.rollout.num_rollout
        return bool(interval) and (last or is_due(interval, rollout_id))

    def begin(self, trained: int, timers: Timers | None = None) -> None:
        """Evaluate the weights after `trained` rollouts while the loop goes on; with deterministic engines, before it
        does, or until a stop is asked for."""
        if self._validate is not None:
            self._record(trained, self._measure(self._validate), timers or Timers())
            return
        self._trained = trained
        self._job.begin_evaluation(trained)
        if self._is_alone:
            self.end(timers or Timers())

    def end_before_training(self, timers: Timers, newcomers: Newcomers, *, may_go_on: bool) -> bool:
        """`end`, unless the evaluation may go on beside training. The engines must keep their memory for that."""
        if may_go_on and not self._config.engines.offload_rollout:
            return True
        return self.end(timers, newcomers)

    def end(self, timers: Timers, newcomers: Newcomers = NOBODY) -> bool:
        """Log the evaluation that has begun, if any; False if asked to stop before it is complete.

        The time that this takes is not part of the step that `timers` is of. `newcomers` can be helped only as long as
        the trainer has the weights that are evaluated.
        """
        if self._trained is None:
            return True
        self._job.status("evaluating", self._trained)
        metrics = self._job.end_evaluation(newcomers)
        if metrics is None:
            return False
        self._record(self._trained, metrics, timers)
        self._trained = None
        return True

    def _measure(self, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
        began = time.perf_counter()
        return validate() | {"perf/eval_s": time.perf_counter() - began}

    def _record(self, trained: int, metrics: dict[str, float], timers: Timers) -> None:
        timers.leave_out(metrics["perf/eval_s"])
        self._job.log(trained - 1, metrics)  # first: an evaluation that is known to be done is not done again
        self._job.event("eval_finished", step=trained, **metrics)


def owes_evaluation(config: Config, first: int) -> bool:
    """Whether the weights that an attempt begins with, after `first` rollouts, are to be evaluated."""
    if not config.evaluation.eval_interval:
        return False
    if not config.rollout.num_rollout:  # it does nothing else
        return True
    if first == 0:
        return not config.evaluation.skip_eval_before_train
    return first == config.rollout.num_rollout or is_due(config.evaluation.eval_interval, first - 1)


def is_due(interval: int | None, rollout_id: int) -> bool:
    """Whether something that happens every `interval` rollouts happens after this one."""
    return interval is not None and (rollout_id + 1) % interval == 0
