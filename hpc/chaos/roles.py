"""Stand-ins for the roles of a job, for speed: `python -m hpc.chaos.roles`, started by a supervisor.

They keep the real order of things (register, wait for each other, keep the metrics, save, log, prove the end) and use
the product's own code for it, but they train a number in place of a model. The next number follows from the one before,
so a step that is lost, or trained twice, shows in all later ones.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from rltrain.run.errors import EXIT_NEVER_RESTART, EXIT_REQUEUE, run_main
from rltrain.run.files import replace_text, sync_directory
from rltrain.run.lifeline import end_without_supervisor
from rltrain.run.role import Registry, RoleContext

STEP_SECONDS = 0.1
PATIENCE_SECONDS = 10.0  # with a supervisor that does not answer
FIRST_VALUE = 1
_MODULUS = 2**31 - 1  # Lehmer's generator, as Park and Miller have it (CACM 31, 1988)
_MULTIPLIER = 16807


def next_value(value: int) -> int:
    """What a step makes of the number."""
    return value * _MULTIPLIER % _MODULUS


def curve(steps: int) -> list[float]:
    """The metric of each step of a run that nothing has disturbed."""
    values = [FIRST_VALUE]
    for _ in range(steps):
        values.append(next_value(values[-1]))
    return [value / _MODULUS for value in values[1:]]


def serve(context: RoleContext, registry: Registry) -> int:
    """Router, engine, rollout process: be ready until told to end. The first two have a directory on their node."""
    from rltrain.sglang.leftovers import NodeDirectory

    directory = NodeDirectory() if context.role in ("router", "engine") else None
    try:
        _wait(registry)
    finally:
        if directory is not None:
            directory.remove()


def _wait(registry: Registry) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(0))
    registry.register("http://127.0.0.1:1")
    while True:
        signal.pause()


def follow(context: RoleContext) -> int:
    """A rank of the trainer other than the first: end as the first does."""
    end = _end_of(context)
    while not end.exists():
        time.sleep(STEP_SECONDS / 4)
    return int(end.read_text())


def train(context: RoleContext, registry: Registry) -> int:
    """The trainer's first rank; returns 0 when all steps are done, 75 when it was asked to stop and has saved."""
    # Only the first rank needs these, and an attempt starts six processes.
    from rltrain import arguments
    from rltrain.tracking import Tracker

    config = arguments.load(context.run_dir)
    steps, interval = config.rollout.num_rollout, config.checkpoint.save_interval
    assert steps is not None and interval is not None
    tracker = Tracker(config, context.layout, context.attempt)
    registry.register("tcp://127.0.0.1:1")
    registry.wait_for("router")
    registry.wait_for("engine", 2)
    registry.wait_for("rollout")
    first, value = load(context.layout.checkpoints)
    registry.event("weights_updated", version=first)
    tracker.catch_up(first)
    unsaved = None
    for step in range(first, steps):
        for phase in ("generating", "training"):
            registry.status(phase, step)
            time.sleep(STEP_SECONDS / 2)
        value = next_value(value)
        metrics = {"rollout/reward": value / _MODULUS, "perf/step_s": STEP_SECONDS}
        stop = registry.stop_requested()
        if stop or step + 1 == steps or (step + 1) % interval == 0:
            tracker.keep(step, metrics)
            unsaved = save_or_tell(registry, context.layout.checkpoints, step + 1, value)
        tracker.log(step, metrics)
        if stop and step + 1 < steps:
            return EXIT_REQUEUE
    if unsaved is None:
        registry.prove_finished(steps, steps)
        return 0
    registry.event("not_finished", reason=unsaved)
    return EXIT_NEVER_RESTART


def save_or_tell(registry: Registry, directory: Path, step: int, value: int) -> str | None:
    """Save, and say so; or say why it can't be, and go on. Returns that."""
    try:
        save(directory, step, value)
    except OSError as error:
        registry.event("checkpoint_failed", step=step, reason=str(error))
        return str(error)
    registry.event("checkpoint_saved", step=step)
    return None


def save(directory: Path, step: int, value: int) -> None:
    """Write a checkpoint: it is there as a whole, or not at all."""
    directory.mkdir(exist_ok=True)
    replace_text(directory / "latest.json", json.dumps({"step": step, "value": value}), durable=True)
    sync_directory(directory)


def load(directory: Path) -> tuple[int, int]:
    """Steps that are trained, and the number that they have made."""
    path = directory / "latest.json"
    if not path.exists():
        return 0, FIRST_VALUE
    saved = json.loads(path.read_text())
    return saved["step"], saved["value"]


def _end_of(context: RoleContext) -> Path:
    return context.run_dir / f"end_{context.attempt}"


def main() -> int:
    """Be the role that the supervisor asks for."""
    context = RoleContext.from_env()
    end_without_supervisor(context, PATIENCE_SECONDS)
    registry = Registry(context)
    if context.role != "trainer":
        return serve(context, registry)
    if os.environ.get("RANK", "0") != "0":
        return follow(context)
    code = train(context, registry)
    replace_text(_end_of(context), str(code))
    return code


if __name__ == "__main__":
    sys.exit(run_main(main))
