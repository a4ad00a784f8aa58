"""The training loop: generate → train → save → push weights, once a rollout; evaluations go on beside it.

Started once a trainer rank by the job's supervisor (`hpc/supervisor.py`). Every rank runs this same loop.
"""

from __future__ import annotations

import argparse
import sys

from rltrain.arguments import UserError, load
from rltrain.data.batch import TrainBatch
from rltrain.job import NOBODY, Job, Newcomers
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
    evaluation = Evaluation(job)
    if owes_evaluation(args, first) and not job.has_evaluated(first):
        evaluation.begin(trained=first)

    for rollout_id in range(first, args.num_rollout):
        last = rollout_id + 1 == args.num_rollout
        timers = Timers()

        actor.offload.for_generating()
        job.status("generating", rollout_id)
        newcomers = find_newcomers(actor, job, rollout_id)
        with timers("rollout"):
            batch = job.generate(rollout_id, newcomers)
        is_saved = rollout_id == first or is_due(args.save_interval, rollout_id - 1)
        # Else: the next attempt could not go back to these weights; engines without memory evaluate nothing.
        beside_training = batch is not None and is_saved and not args.offload_rollout
        evaluated = beside_training or evaluation.end(timers, newcomers)
        if batch is None or not evaluated:  # asked to stop: the next attempt does what is unfinished
            if not is_saved:
                job.status("saving", rollout_id)
                actor.save(rollout_id - 1)
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
        if eval_due:
            evaluation.begin(trained=rollout_id + 1)
        timers.stop_step()
        job.log(rollout_id, metrics | timers.metrics())
    return 0 if evaluation.end(Timers()) else EXIT_REQUEUE


class Evaluation:
    """At most one evaluation, of the weights that the engines have: it must end before they get others."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._trained: int | None = None

    def begin(self, trained: int) -> None:
        """Evaluate the weights after `trained` rollouts while the loop goes on."""
        self._trained = trained
        self._job.begin_evaluation(trained)

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
        timers.leave_out(metrics["perf/eval_s"])
        self._job.event("eval_finished", step=self._trained, **metrics)
        self._job.log(self._trained - 1, metrics)
        self._trained = None
        return True


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


def find_newcomers(actor: MegatronTrainActor, job: Job, rollout_id: int) -> Newcomers:
    """Engines that come back while a rollout is waited for, and what they are given."""

    def give_weights() -> None:
        push_weights(actor, job, version=rollout_id)
        job.status("generating", rollout_id)

    return Newcomers(lambda: actor.lacks_weights(job.find_engines), give_weights)


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
