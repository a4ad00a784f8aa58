"""The training loop: generate → train → save → push weights, once a rollout; evaluations go on beside it.

Started once a trainer rank by the job's supervisor (`hpc/supervisor/supervisor.py`). Every rank runs this same loop.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable

if __name__ == "__main__":
    gc.disable()  # what is imported stays: looking for garbage in it took a fifth of the time

import pyarrow as pa

from rltrain.arguments import load
from rltrain.arguments.config import Config
from rltrain.data.batch import TrainBatch
from rltrain.evaluation import Evaluation, is_due
from rltrain.job import Job, make_room
from rltrain.megatron.actor import MegatronTrainActor
from rltrain.megatron.memory import EngineMemory
from rltrain.megatron.model.specs import describe_layers
from rltrain.megatron.profile import Profiler
from rltrain.megatron.ranks import init_process_group
from rltrain.megatron.training.share import describe_sharing
from rltrain.packages import check_trainer
from rltrain.run.errors import EXIT_NEVER_RESTART, EXIT_REQUEUE, run_main
from rltrain.run.lifeline import end_without_supervisor
from rltrain.run.role import Registry, RoleContext
from rltrain.run.timing import Timers
from rltrain.weights.nccl import nccl_settings


def train(config: Config, actor: MegatronTrainActor, job: Job) -> int:
    """Train until `--num-rollout`; returns the exit code: 0 done, 75 saved and wants to run again."""
    first = actor.start_rollout_id
    job.catch_up(first)
    job.load(first)
    job.push_weights(actor, version=first)
    evaluation = Evaluation(job, config, validation(config, actor))
    evaluation.begin_if_owed(first)
    saved = first  # rollouts that the newest checkpoint was trained on

    for rollout_id in range(first, config.rollout.num_rollout):
        last = rollout_id + 1 == config.rollout.num_rollout
        timers = Timers()

        actor.offload.for_generating()
        job.status("generating", rollout_id)
        newcomers = job.newcomers(actor, rollout_id)
        with timers("rollout"):
            batch = job.generate(rollout_id, newcomers)
        may_go_on = batch is not None and saved == rollout_id  # the next attempt can repeat it with these
        evaluated = evaluation.end_before_training(timers, newcomers, may_go_on=may_go_on)
        if batch is None or not evaluated:  # asked to stop: the next attempt does what is unfinished
            if saved < rollout_id:
                save(actor, job, rollout_id - 1)
            return EXIT_REQUEUE
        table, metrics = batch

        job.status("training", rollout_id)
        with timers("train"):
            metrics |= actor.train(rollout_id, TrainBatch.from_arrow(table))
        if rollout_id == first:
            job.check_logprobs(rollout_id, metrics)
        if not evaluation.end(timers):  # asked to stop: the next attempt needs the weights from before
            return EXIT_REQUEUE

        stop = job.stop_requested()
        if stop or last or is_due(config.checkpoint.save_interval, rollout_id):
            # Whoever dies after the checkpoint, the next attempt goes on behind it.
            job.keep(rollout_id, metrics)
            with timers("save"):
                save(actor, job, rollout_id)
            saved = rollout_id + 1
        if stop and not last:
            timers.stop_step()
            job.log(rollout_id, metrics | timers.metrics())
            return EXIT_REQUEUE

        eval_due = evaluation.is_due_after(rollout_id)
        if eval_due or is_due(config.weights.update_weights_interval, rollout_id):
            with timers("update_weights"):
                job.push_weights(actor, version=rollout_id + 1)
        if eval_due:
            evaluation.begin(rollout_id + 1, timers)
        timers.stop_step()
        job.log(rollout_id, metrics | timers.metrics())
    return 0 if evaluation.end(Timers()) else EXIT_REQUEUE


def validation(config: Config, actor: MegatronTrainActor) -> Callable[[], dict[str, float]] | None:
    """How the evaluation sets are evaluated without engines; None where engines do it, or there are no sets."""
    if not (config.debug.debug_train_only and config.evaluation.eval_interval):
        return None
    # Imported late: it loads the engine clients, which other runs do not need.
    from rltrain.validation import ValidationLoss

    loss = ValidationLoss(config, actor.shape)
    return lambda: loss.measure(actor.policy)


def save(actor: MegatronTrainActor, job: Job, rollout_id: int) -> None:
    """Write a checkpoint of the weights after this rollout."""
    job.status("saving", rollout_id)
    actor.save(rollout_id)


def main() -> int:
    """Run this rank."""
    gc.freeze()
    gc.enable()
    check_trainer()
    context = RoleContext.from_env()
    end_without_supervisor(context)
    registry = Registry(context)
    config = load(context.run_dir)
    # NCCL reads them once, when it is first used.
    os.environ.update(
        nccl_settings(config.engines, config.weights, config.parallel, config.debug, os.environ)
    )
    init_process_group(context, registry, config.parallel, config.optimizer.seed)
    if context.index == 0:
        print(describe_layers(), flush=True)
    profiler = Profiler(config.profiling, config.tracking, context)
    with profiler.memory():
        return run(config, context, registry, profiler)


def run(config: Config, context: RoleContext, registry: Registry, profiler: Profiler) -> int:
    """Build the model and train it; returns the exit code."""
    engine_memory = EngineMemory(config.engines, config.debug)
    make_room(config.engines, config.debug, context, registry, engine_memory)
    actor = MegatronTrainActor(config, context, registry, engine_memory, profiler)
    if context.index == 0:
        print(describe_sharing(actor.config, actor.shape), flush=True)
    # Its first conversion imports pandas, which the first batch would wait for: now the engines are waited for anyway.
    pa.array([0])
    job = Job(actor.config, context, registry)
    try:
        job.connect()
        exit_code = train(actor.config, actor, job)
        unsaved = actor.finish()
        if exit_code == 0:
            job.prove_finished(unsaved)
        return exit_code
    finally:
        job.finish()


if __name__ == "__main__":
    sys.exit(run_main(main, EXIT_NEVER_RESTART))
