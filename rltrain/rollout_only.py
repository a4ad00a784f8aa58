"""The loop of --debug-rollout-only: generate with the weights that the engines start with; nothing is trained.

Started by the job's supervisor in the place of the trainer ranks, with neither torch nor a model.
"""

from __future__ import annotations

import argparse
import sys
import time

from rltrain.arguments import UserError, load
from rltrain.arguments.fleet import engine_specs
from rltrain.rollout.client import RolloutClient
from rltrain.runtime import EXIT_NEVER_RESTART, EXIT_REQUEUE, Registry, RoleContext
from rltrain.stop import unless_stopped
from rltrain.tracking import Tracker


def generate_all(
    args: argparse.Namespace,
    context: RoleContext,
    registry: Registry,
    tracker: Tracker,
    client: RolloutClient,
) -> int:
    """Every rollout that is not on disk yet, and the evaluation sets once; returns the exit code."""
    steps = range(args.num_rollout)
    first = next((step for step in steps if context.layout.find_step(step) is None), args.num_rollout)
    client.load(first)
    if args.eval_datasets and not first:  # the weights stay as they are: once is enough
        registry.status("evaluating", 0)
        evaluation = unless_stopped(registry, client.eval, 0)
        if evaluation is None:
            return EXIT_REQUEUE
        registry.event("eval_finished", step=0, **evaluation)
        tracker.log(-1, evaluation)
    for rollout_id in range(first, args.num_rollout):
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
    args = load(context.run_dir)
    registry.status("loading")
    registry.wait_for("engine", len(engine_specs(args)))
    client = RolloutClient(registry.wait_for("rollout")[0].url, context.auth)
    tracker = Tracker(args, context.layout, context.attempt)
    try:
        return generate_all(args, context, registry, tracker, client)
    finally:
        tracker.finish()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_NEVER_RESTART)
