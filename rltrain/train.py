"""The training loop: generate → train → save → push weights → evaluate, once a rollout.

Started once a trainer rank by the job's supervisor (`hpc/supervisor.py`). Every rank runs this same loop.
"""

from __future__ import annotations

import argparse
import sys

from rltrain.arguments import UserError, load
from rltrain.data.batch import TrainBatch
from rltrain.job import Job
from rltrain.megatron.actor import MegatronTrainActor
from rltrain.megatron.distributed import init_process_group
from rltrain.runtime import EXIT_NEVER_RESTART, EXIT_REQUEUE, Registry, RoleContext
from rltrain.timing import Timers


def train(args: argparse.Namespace, actor: MegatronTrainActor, job: Job) -> int:
    """Train until `--num-rollout`; returns the exit code: 0 done, 75 saved and wants to run again."""
    first = actor.start_rollout_id
    job.catch_up(first)
    job.rollout(lambda client: client.load(first))
    push_weights(actor, job, version=first)
    if owes_evaluation(args, first) and not job.has_evaluated(first):
        evaluation = evaluate(job, trained=first)
        if evaluation is None:
            return EXIT_REQUEUE
        job.log(first - 1, evaluation)

    for rollout_id in range(first, args.num_rollout):
        last = rollout_id + 1 == args.num_rollout
        timers = Timers()

        actor.offload.for_generating()
        job.status("generating", rollout_id)
        with timers("rollout"):
            batch = job.generate(rollout_id)
        if batch is None:  # asked to stop: only an unfinished rollout is lost
            if rollout_id > first and not is_due(args.save_interval, rollout_id - 1):
                job.status("saving", rollout_id)
                actor.save(rollout_id - 1)
            return EXIT_REQUEUE
        table, metrics = batch

        job.status("training", rollout_id)
        with timers("train"):
            metrics |= actor.train(rollout_id, TrainBatch.from_arrow(table))
        if rollout_id == first:
            job.check_logprobs(rollout_id, metrics)

        stop = job.stop_requested()
        save_due = stop or last or is_due(args.save_interval, rollout_id)
        if save_due:
            job.status("saving", rollout_id)
            with timers("save"):
                actor.save(rollout_id)
        if stop and not last:
            job.log(rollout_id, metrics | timers.metrics())
            return EXIT_REQUEUE

        eval_due = args.eval_interval and (last or is_due(args.eval_interval, rollout_id))
        if eval_due or is_due(args.update_weights_interval, rollout_id):
            with timers("update_weights"):
                push_weights(actor, job, version=rollout_id + 1)
        timers.stop_step()

        evaluation = {}
        if eval_due:
            with timers("eval"):
                evaluation = evaluate(job, trained=rollout_id + 1)
        job.log(rollout_id, metrics | (evaluation or {}) | timers.metrics())
        if evaluation is None:  # asked to stop: the next attempt evaluates
            if not save_due:
                job.status("saving", rollout_id)
                actor.save(rollout_id)
            return EXIT_REQUEUE
    return 0


def owes_evaluation(args: argparse.Namespace, first: int) -> bool:
    """Whether the weights that an attempt begins with, after `first` rollouts, are to be evaluated."""
    if not args.eval_interval:
        return False
    if first == 0:
        return not args.skip_eval_before_train
    return first == args.num_rollout or is_due(args.eval_interval, first - 1)


def is_due(interval: int | None, rollout_id: int) -> bool:
    """Whether something that happens every `interval` rollouts happens after this one."""
    return interval is not None and (rollout_id + 1) % interval == 0


def push_weights(actor: MegatronTrainActor, job: Job, version: int) -> None:
    """Give the engines the actor's weights as `version`: the number of rollouts that they were trained on."""
    job.status("weights", version)
    actor.update_weights(job.find_engines, version)
    job.rollout(lambda client: client.weights(version))


def evaluate(job: Job, trained: int) -> dict[str, float] | None:
    """Evaluate the weights that the engines hold, after `trained` rollouts; None if asked to stop meanwhile."""
    job.status("evaluating", trained)
    metrics = job.evaluate(trained)
    if metrics is not None:
        job.event("eval_finished", step=trained, **metrics)
    return metrics


def main() -> int:
    """Run this rank."""
    context = RoleContext.from_env()
    registry = Registry(context)
    args = load(context.run_dir)
    init_process_group(context, registry, args)
    actor = MegatronTrainActor(args, context, registry)
    job = Job(args, context, registry)
    try:
        job.connect()
        exit_code = train(args, actor, job)
        actor.finish()
        return exit_code
    finally:
        job.finish()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_NEVER_RESTART)
