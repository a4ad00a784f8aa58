"""A stand-in for any role of a job, for fault tests: `python role.py BEHAVIOUR`.

Hundreds of these are started: what only some need is imported where they need it.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable

from rltrain.run import role
from rltrain.run.errors import run_main
from rltrain.run.role import Registry, RoleContext

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def serve(context: RoleContext, registry: Registry) -> int:
    """Be ready until told to end."""
    registry.register("http://127.0.0.1:1")
    signal.pause()
    return 0


def clean_up(context: RoleContext, registry: Registry) -> int:
    """Be ready, with a mark on the node that the log names; remove it when told to end, which is SIGUSR1 on Slurm."""
    from rltrain.sglang.leftovers import NodeDirectory

    directory = NodeDirectory(context.run_dir)
    print("mark:", directory.path)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    registry.register("http://127.0.0.1:1")
    signal.pause()
    directory.remove()
    return 0


def take_time(step: int) -> None:
    time.sleep(0.05)


def train(context: RoleContext, registry: Registry, compute: Callable[[int], None] = take_time) -> int:
    """Train `--num-rollout` steps of 0.05 s; save only when a stop is asked for. Ranks other than 0 do as it does."""
    end = context.run_dir / f"end_{context.attempt}"
    if os.environ.get("RANK", "0") != "0":
        while not end.exists():
            time.sleep(0.02)
        return int(end.read_text())
    code = _train_as_first(context, registry, compute)
    end.with_suffix(".tmp").write_text(str(code))
    end.with_suffix(".tmp").rename(end)
    return code


def hurry(context: RoleContext, registry: Registry) -> int:
    """Train as `train` does, from step 5 on not before a stop or fault; after the first attempt ten times as fast."""

    def compute(step: int) -> None:
        if context.attempt:
            time.sleep(0.005)
        else:
            wait_from_5(step, registry.stop_requested)

    return train(context, registry, compute)


def pause(context: RoleContext, registry: Registry) -> int:
    """Train as `train` does; from step 5 on wait for the file `go_on` in the run's directory, or a stop."""
    go_on = context.run_dir / "go_on"
    return train(
        context, registry, lambda step: wait_from_5(step, lambda: go_on.exists() or registry.stop_requested())
    )


def wait_from_5(step: int, condition: Callable[[], object]) -> None:
    """Take a step's time; from step 5 on at least until the condition holds."""
    take_time(step)
    while step >= 5 and not condition():
        time.sleep(0.02)


def _train_as_first(context: RoleContext, registry: Registry, compute: Callable[[int], None]) -> int:
    import tomllib

    num_rollout = tomllib.loads(context.layout.config.read_text())["train"]["num_rollout"]
    registry.register("tcp://127.0.0.1:1")
    registry.wait_for("engine", int(os.environ["FAKE_ENGINES"]))
    saved = context.layout.checkpoints / "latest_checkpointed_iteration.txt"
    for step in range(int(saved.read_text()) if saved.exists() else 0, num_rollout):
        registry.status("training", step)
        compute(step)
        row = {"step": step, "attempt": context.attempt, "rollout/reward": 0.5, "perf/step_s": 0.05}
        with context.layout.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if registry.stop_requested():
            saved.parent.mkdir(exist_ok=True)
            saved.write_text(str(step + 1))
            return 75
    registry.prove_finished(num_rollout)
    return 0


def leave_early(context: RoleContext, registry: Registry) -> int:
    """In the first attempt end with 0 in the middle, as srun does when Slurm gives up on a step; later train."""
    if context.attempt:
        return train(context, registry)
    registry.register("tcp://127.0.0.1:1")
    registry.event("checkpoint_saved", step=1)
    registry.status("training", 1)
    return 0


def save_fails(context: RoleContext, registry: Registry) -> int:
    """Train all steps, and stop on a full disk instead of proving it."""
    registry.register("tcp://127.0.0.1:1")
    registry.event("checkpoint_failed", step=2, reason="iter_0000002 was not saved: OSError: [Errno 28]")
    print(
        "error: all 2 steps are trained, but their last checkpoint is lost: [Errno 28] No space left on device"
    )
    return 93


def killed(context: RoleContext, registry: Registry) -> int:
    """In its first life be killed from outside, before it is ready; then be ready until told to end."""
    if not context.restarts:
        os.kill(os.getpid(), signal.SIGKILL)
    return serve(context, registry)


def die(context: RoleContext, registry: Registry) -> int:
    """Become ready, write a log and fail once training has begun."""
    registry.register("http://127.0.0.1:1")
    registry.wait_for("trainer")
    for i in range(30):
        print("log line", i)
    print("Traceback: the engine has no memory left")
    return 3


def die_once(context: RoleContext, registry: Registry) -> int:
    """Fail as `die` does; started again, say in whose place, and be ready until told to end."""
    if not context.restarts:
        return die(context, registry)
    print(f"start {context.restarts} in place of {context.replaces}")
    return serve(context, registry)


def part_dies_once(context: RoleContext, registry: Registry) -> int:
    """As an engine that spans nodes: only the first part serves; another fails in its first life."""
    print(f"part {context.node_rank} of {context.nnodes}", flush=True)
    if context.node_rank == 0:
        return serve(context, registry)
    if context.restarts:
        signal.pause()
    registry.wait_for("trainer")
    registry.wait_for("engine")
    return 3


def never_again(context: RoleContext, registry: Registry) -> int:
    """Say that running again would fail in the same way."""
    registry.register("tcp://127.0.0.1:1")
    print("error: the prompts are no prompts")
    return 93


def hang(context: RoleContext, registry: Registry) -> int:
    """Take no notice of anything."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    registry.register("tcp://127.0.0.1:1")
    registry.status("training", 0)
    time.sleep(600)
    return 0


def leak(context: RoleContext, registry: Registry) -> int:
    """Leave behind a process that has a session of its own, whose parent is gone, and that ignores SIGTERM."""
    import subprocess

    middle = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
    subprocess.run([sys.executable, "-c", middle, STUBBORN], check=True)
    return serve(context, registry)


def impatient(context: RoleContext, registry: Registry) -> int:
    """Once SIGUSR1 has come, wait for an answer for half a second, where others wait for ten minutes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    registry.register("tcp://127.0.0.1:1")
    registry.status("training", 0)
    (context.run_dir / "answered").touch()
    signal.sigwait({signal.SIGUSR1})
    role._ANSWER_SECONDS = 0.5
    registry.status("training", 1)
    return 0


if __name__ == "__main__":
    context = RoleContext.from_env()
    behaviours = sys.argv[1].split(",")
    behaviour = globals()[behaviours[min(context.index, len(behaviours) - 1)]]
    sys.exit(run_main(lambda: behaviour(context, Registry(context))))
