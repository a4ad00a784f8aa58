"""A trainer rank's connections to the rest of the job: rollout process, engines, registry, metrics.

Only rank 0 talks to them. Every method is called by all ranks, in the same order, and gives all of them the
same answer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import torch.distributed as dist

from rltrain.arguments.fleet import engine_specs
from rltrain.megatron.distributed import on_rank_0
from rltrain.rollout.client import RolloutClient
from rltrain.runtime import Registry, RoleContext
from rltrain.sglang.check import check_engine
from rltrain.sglang.engines import ExternalEngine, JobEngine, find_engines
from rltrain.stop import Interrupted, answer_unless_interrupted, ask
from rltrain.tracking import Tracker

T = TypeVar("T")

# How far the log-probs of trainer and engine may be apart on the same tokens: they compute the same function.
LOGPROB_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class Newcomers:
    """Engines that have been started again, and can't help before the trainer has given them its weights.

    Attributes:
        are_there: asked on rank 0.
        give_weights: called by all ranks together.
    """

    are_there: Callable[[], bool]
    give_weights: Callable[[], object]


NOBODY = Newcomers(lambda: False, lambda: None)


class Job:
    """What the training loop needs beside the model."""

    def __init__(self, args: argparse.Namespace, context: RoleContext, registry: Registry) -> None:
        self._args, self._context, self._registry = args, context, registry
        self._tracker = Tracker(args, context.layout, context.attempt) if dist.get_rank() == 0 else None
        self._rollout: RolloutClient | None = None
        self._evaluation: Future[dict[str, float]] | None = None

    def connect(self) -> None:
        """Wait until rollout process and engines are ready."""
        on_rank_0(self._connect)

    def _connect(self) -> None:
        self._registry.status("loading")
        self._rollout = RolloutClient(self._registry.wait_for("rollout")[0].url, self._context.auth)
        if not self._args.debug_train_only:
            self._registry.wait_for("engine", len(engine_specs(self._args)))
            for engine in self.find_engines():
                for note in check_engine(self._args, engine):
                    print(note, flush=True)

    def find_engines(self) -> list[JobEngine | ExternalEngine]:
        """The engines that are ready now and take the trainer's weights; for rank 0."""
        return find_engines(self._args, self._registry, self._context.token)

    def rollout(self, call: Callable[[RolloutClient], T]) -> T:
        """The result of one call to the rollout process."""
        return on_rank_0(lambda: call(self._rollout))  # type: ignore[arg-type]

    def generate(
        self, rollout_id: int, newcomers: Newcomers = NOBODY
    ) -> tuple[pa.Table, dict[str, float]] | None:
        """The batch and the metrics of a rollout; None if the job is asked to stop before it is complete."""
        answer = ask(self._client.generate, rollout_id) if dist.get_rank() == 0 else None
        return self._await(answer, newcomers)

    def begin_evaluation(self, trained: int) -> None:
        """Have the engines' weights evaluated, after `trained` rollouts, while the loop goes on."""
        if dist.get_rank() == 0:
            self._evaluation = ask(self._evaluate, trained)

    def end_evaluation(self, newcomers: Newcomers = NOBODY) -> dict[str, float] | None:
        """Wait for the metrics of the evaluation that has begun; None if asked to stop before it is complete."""
        began = time.perf_counter()
        metrics = self._await(self._evaluation, newcomers)
        return None if metrics is None else metrics | {"perf/eval_s": time.perf_counter() - began}

    def _await(self, answer: Future[T] | None, newcomers: Newcomers) -> T | None:
        """What rank 0 waits for; None if the job is asked to stop before."""

        def wait() -> T | Interrupted:
            assert answer is not None
            return answer_unless_interrupted(self._registry, answer, newcomers.are_there)

        while (result := on_rank_0(wait)) is Interrupted.NEWCOMERS:
            newcomers.give_weights()
        return None if isinstance(result, Interrupted) else result

    def _evaluate(self, trained: int) -> dict[str, float]:
        began = time.perf_counter()
        metrics = self._client.eval(trained)
        return metrics | {"perf/eval_duration_s": time.perf_counter() - began}

    @property
    def _client(self) -> RolloutClient:
        assert self._rollout is not None
        return self._rollout

    def has_evaluated(self, trained: int) -> bool:
        """Whether an evaluation after `trained` rollouts has been completed, in whichever attempt."""
        return on_rank_0(lambda: trained in evaluated_steps(self._context.layout.events))

    def status(self, phase: str, step: int | None = None) -> None:
        """Tell the live view what the run does now."""
        if dist.get_rank() == 0:
            self._registry.status(phase, step)

    def event(self, kind: str, **fields: object) -> None:
        """Append to the run's events."""
        if dist.get_rank() == 0:
            self._registry.event(kind, **fields)

    def stop_requested(self) -> str | None:
        """Why the job should save and stop now, or None."""
        return on_rank_0(self._registry.stop_requested)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        if self._tracker is not None:
            self._tracker.log(step, metrics)

    def catch_up(self, done: int) -> None:
        """Give W&B what it lacks of the steps before `done`, which earlier attempts have recorded."""
        if self._tracker is not None:
            self._tracker.catch_up(done)

    def check_logprobs(self, step: int, metrics: dict[str, float]) -> None:
        """Say whether trainer and engines agree on the log-probs of the first batch of this attempt."""
        mean = metrics.get("train/logprob_abs_diff")
        if mean is None:
            return
        tolerance = LOGPROB_TOLERANCE["bf16" if self._args.bf16 else "fp32"]
        verdict = "agree" if mean <= tolerance else "DIFFER"
        if dist.get_rank() == 0:
            print(
                f"log-probs of trainer and engines {verdict}: mean |difference| {mean:.2e}, limit {tolerance:.0e}"
            )
        self.event("logprob_check", step=step, mean_abs_diff=mean, tolerance=tolerance, ok=mean <= tolerance)

    def finish(self) -> None:
        """Flush the metrics."""
        if self._tracker is not None:
            self._tracker.finish()


def evaluated_steps(events: Path) -> set[int]:
    """Numbers of rollouts after which an evaluation was completed, from the run's `events.jsonl`."""
    lines = events.read_text().splitlines() if events.exists() else []
    return {json.loads(line)["step"] for line in lines if '"kind": "eval_finished"' in line}
