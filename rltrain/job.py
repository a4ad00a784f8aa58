"""A trainer rank's connections to the rest of the job: rollout process, engines, registry, metrics.

Only rank 0 talks to them. Every method is called by all ranks, in the same order, and gives all of them the
same answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa
import torch.distributed as dist

from rltrain.arguments.config import Config
from rltrain.arguments.fleet import engine_specs
from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.megatron.device import use_cuda
from rltrain.megatron.memory import CACHE, WEIGHTS, EngineMemory
from rltrain.megatron.ranks import first_problem, on_rank_0
from rltrain.rollout.service.client import RolloutClient
from rltrain.run.errors import UserError
from rltrain.run.files import read_lines
from rltrain.run.role import Registry, RoleContext
from rltrain.run.waiting import Interrupted, answer_unless_interrupted, ask
from rltrain.sglang.engines import ExternalEngine, JobEngine, check_engine, find_engines
from rltrain.tracking import Tracker

if TYPE_CHECKING:
    from rltrain.megatron.actor import MegatronTrainActor

T = TypeVar("T")
Told = TypeVar("Told")

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


def make_room(
    engines: Engines, debug: Debug, context: RoleContext, registry: Registry, memory: EngineMemory
) -> None:
    """Where trainer and engines take turns on GPUs: wait for the engines, and have them give up their memory.

    An engine takes its share of what is free when it starts, so it comes first, and the trainer's model is built in
    the remaining room. Elsewhere both start side by side. All ranks call this together.
    """
    if not (memory.moves and use_cuda()):
        return
    memory.find_engines = lambda: find_engines(engines, debug, registry, context.token)

    def release() -> None:
        registry.wait_for("engine", len(engine_specs(engines, debug)))
        memory.release(CACHE)
        memory.release(WEIGHTS)

    on_rank_0(release)


NOBODY = Newcomers(lambda: False, lambda: None)


class Job:
    """What the training loop needs beside the model."""

    def __init__(self, config: Config, context: RoleContext, registry: Registry) -> None:
        self._config, self._context, self._registry = config, context, registry
        self._tracker = Tracker(config, context.layout, context.attempt) if dist.get_rank() == 0 else None
        self._rollout: RolloutClient | None = None
        self._evaluation: Future[dict[str, float]] | None = None

    def connect(self) -> None:
        """Wait until rollout process and engines are ready."""
        on_rank_0(self._connect)

    def _connect(self) -> None:
        self._registry.status("loading")
        self._rollout = RolloutClient(self._registry.wait_for("rollout")[0].url, self._context.token)
        if not self._config.debug.debug_train_only:
            self._registry.wait_for("engine", len(engine_specs(self._config.engines, self._config.debug)))
            for engine in self.find_engines():
                for note in check_engine(self._config.model, engine):
                    print(note, flush=True)

    def find_engines(self) -> list[JobEngine | ExternalEngine]:
        """The engines that are ready now and take the trainer's weights; for rank 0."""
        config, token = self._config, self._context.token
        return find_engines(config.engines, config.debug, self._registry, token)

    def load(self, rollout_id: int) -> None:
        """Have the rollout process put its data source where it stood before this rollout."""
        on_rank_0(lambda: self._client.load(rollout_id))

    def push_weights(self, actor: MegatronTrainActor, version: int) -> None:
        """Give the engines the actor's weights as `version`: the number of rollouts that they were trained on."""
        self.status("weights", version)
        actor.update_weights(self.find_engines, version)
        on_rank_0(lambda: self._client.weights(version))

    def newcomers(self, actor: MegatronTrainActor, rollout_id: int) -> Newcomers:
        """Engines that come back while a rollout is waited for, and what they are given."""

        def give_weights() -> None:
            self.push_weights(actor, version=rollout_id)
            self.status("generating", rollout_id)

        return Newcomers(lambda: actor.lacks_weights(self.find_engines), give_weights)

    def generate(
        self, rollout_id: int, newcomers: Newcomers = NOBODY
    ) -> tuple[pa.Table, dict[str, float]] | None:
        """The batch and the metrics of a rollout; None if the job is asked to stop before it is complete."""
        answer = ask(self._client.generate, rollout_id) if dist.get_rank() == 0 else None
        metrics = self._await(answer, newcomers, lambda batch: batch[1])
        if metrics is None:
            return None
        # Imported late: Megatron-core comes with it, and must come after what hides W&B from it.
        from rltrain.megatron.training.share import table_of_rank_0

        return table_of_rank_0(None if answer is None else answer.result()[0]), metrics

    def begin_evaluation(self, trained: int) -> None:
        """Have the engines' weights evaluated, after `trained` rollouts, while the loop goes on."""
        if dist.get_rank() == 0:
            self._evaluation = ask(self._evaluate, trained)

    def end_evaluation(self, newcomers: Newcomers = NOBODY) -> dict[str, float] | None:
        """Wait for the metrics of the evaluation that has begun; None if asked to stop before it is complete."""
        began = time.perf_counter()
        metrics = self._await(self._evaluation, newcomers, lambda metrics: metrics)
        return None if metrics is None else metrics | {"perf/eval_s": time.perf_counter() - began}

    def _await(
        self, answer: Future[T] | None, newcomers: Newcomers, told: Callable[[T], Told]
    ) -> Told | None:
        """Apply `told` to rank 0's answer, on every rank; None if a stop is requested first."""

        def wait() -> Told | Interrupted:
            assert answer is not None
            result = answer_unless_interrupted(self._registry, answer, newcomers.are_there)
            return result if isinstance(result, Interrupted) else told(result)

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

    def keep(self, step: int, metrics: dict[str, float]) -> None:
        """Write down the metrics of a step that is not over; `log` follows."""
        if self._tracker is not None:
            self._tracker.keep(step, metrics)

    def catch_up(self, done: int) -> None:
        """Give W&B what it lacks of the steps before `done`, which earlier attempts have recorded."""
        if self._tracker is not None:
            self._tracker.catch_up(done)

    def check_logprobs(self, step: int, metrics: dict[str, float]) -> None:
        """Say whether trainer and engines agree on the log-probs of the first batch of this attempt."""
        mean = metrics.get("train/logprob_abs_diff")
        if mean is None:
            return
        tolerance = LOGPROB_TOLERANCE["bf16" if self._config.model.bf16 else "fp32"]
        verdict = "agree" if mean <= tolerance else "DIFFER"
        if dist.get_rank() == 0:
            print(
                f"log-probs of trainer and engines {verdict}: mean |difference| {mean:.2e}, limit {tolerance:.0e}"
            )
        self.event("logprob_check", step=step, mean_abs_diff=mean, tolerance=tolerance, ok=mean <= tolerance)

    def prove_finished(self, unsaved: str | None) -> None:
        """Write that the run is finished, when every rank has come here.

        Args:
            unsaved: why the last weights are not saved, if so.

        Raises:
            UserError: they are not.
        """
        steps = self._config.rollout.num_rollout
        if reason := first_problem(unsaved):
            raise UserError(
                f"all {steps} steps are trained, but their last checkpoint is lost: {reason}. Make room, and submit"
                " the run again: it resumes from the newest saved checkpoint."
            )
        checkpoint = steps if self._config.checkpoint.save and steps else None
        on_rank_0(lambda: self._registry.prove_finished(steps, checkpoint))

    def finish(self) -> None:
        """Flush the metrics."""
        if self._tracker is not None:
            self._tracker.finish()


def evaluated_steps(events: Path) -> set[int]:
    """Numbers of rollouts after which an evaluation was completed, from the run's `events.jsonl`."""
    return {event["step"] for event in read_lines(events) if event.get("kind") == "eval_finished"}
