"""The loop of --debug-rollout-only: generate with the weights that the engines start with; nothing is trained.

Started by the job's supervisor in place of the trainer ranks, with neither torch nor a model.
"""

from __future__ import annotations

import sys
import time

from rltrain.arguments import load
from rltrain.arguments.fleet import engine_specs
from rltrain.arguments.groups.evaluation import Evaluation
from rltrain.arguments.groups.rollout import Rollout
from rltrain.rollout.service.client import RolloutClient
from rltrain.run.errors import EXIT_NEVER_RESTART, EXIT_REQUEUE, run_main
from rltrain.run.files import read_lines
from rltrain.run.metric_lines import newest_rows
from rltrain.run.role import Registry, RoleContext
from rltrain.run.waiting import unless_stopped
from rltrain.tracking import Tracker


def generate_all(
    rollout: Rollout,
    evaluation: Evaluation,
    context: RoleContext,
    registry: Registry,
    tracker: Tracker,
    client: RolloutClient,
) -> int:
    """Every rollout that is not on disk yet, and the evaluation sets once; returns the exit code."""
    steps = range(rollout.num_rollout)
    logged = newest_rows(read_lines(context.layout.metrics))
    # A rollout that is on disk, but not in the metrics, is taken from there and logged.
    first = next(
        (step for step in steps if context.layout.find_step(step) is None or step not in logged),
        rollout.num_rollout,
    )
    client.load(first)
    if evaluation.eval_datasets and not first:  # the weights stay as they are: once is enough
        registry.status("evaluating", 0)
        metrics = unless_stopped(registry, client.eval, 0)
        if metrics is None:
            return EXIT_REQUEUE
        tracker.log(-1, metrics)
        registry.event("eval_finished", step=0, **metrics)
    for rollout_id in range(first, rollout.num_rollout):
        registry.status("generating", rollout_id)
        began = time.perf_counter()
        client.weights(rollout_id)
        batch = unless_stopped(registry, client.generate, rollout_id)
        if batch is None:
            return EXIT_REQUEUE
        tracker.log(rollout_id, batch[1] | {"perf/step_s": time.perf_counter() - began})
    return 0


def main() -> int:
    """Run the loop."""
    context = RoleContext.from_env()
    registry = Registry(context)
    config = load(context.run_dir)
    registry.status("loading")
    registry.wait_for("engine", len(engine_specs(config.engines, config.debug)))
    client = RolloutClient(registry.wait_for("rollout")[0].url, context.token)
    tracker = Tracker(config, context.layout, context.attempt)
    try:
        exit_code = generate_all(config.rollout, config.evaluation, context, registry, tracker, client)
        if exit_code == 0:
            registry.prove_finished(config.rollout.num_rollout)
        return exit_code
    finally:
        tracker.finish()


if __name__ == "__main__":
    sys.exit(run_main(main, EXIT_NEVER_RESTART))
