"""A stand-in for any role of a job, for fault tests: `python role.py BEHAVIOUR`."""

import json
import os
import signal
import subprocess
import sys
import time

from rltrain.runtime import Registry, RoleContext

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def serve(context: RoleContext, registry: Registry) -> int:
    """Be ready until told to end."""
    registry.register("http://127.0.0.1:1")
    signal.pause()
    return 0


def train(context: RoleContext, registry: Registry) -> int:
    """Two steps, or as many as it takes until a stop is asked for with FAKE_STEPS set high."""
    registry.register("tcp://127.0.0.1:1")
    registry.wait_for("rollout")
    saved = context.layout.checkpoints / "latest_checkpointed_iteration.txt"
    first = int(saved.read_text()) if saved.exists() else 0
    for step in range(first, int(os.environ.get("FAKE_STEPS", "2"))):
        registry.status("training", step, num_rollout=2)
        time.sleep(0.1)
        row = {"step": step, "attempt": context.attempt, "rollout/reward": 0.5, "perf/step_s": 0.1}
        with context.layout.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if registry.stop_requested():
            saved.parent.mkdir(exist_ok=True)
            saved.write_text(str(step + 1))
            return 75
    return 0


def die(context: RoleContext, registry: Registry) -> int:
    """Become ready, write a log and fail."""
    registry.register("http://127.0.0.1:1")
    for i in range(30):
        print("log line", i)
    print("Traceback: the engine has no memory left")
    return 3


def hang(context: RoleContext, registry: Registry) -> int:
    """Take no notice of anything."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    registry.register("tcp://127.0.0.1:1")
    registry.status("training", 0)
    time.sleep(600)
    return 0


def leak(context: RoleContext, registry: Registry) -> int:
    """Leave behind a process that has a session of its own, whose parent is gone, and that ignores SIGTERM."""
    middle = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
    subprocess.run([sys.executable, "-c", middle, STUBBORN], check=True)
    return serve(context, registry)


if __name__ == "__main__":
    context = RoleContext.from_env()
    sys.exit(globals()[sys.argv[1]](context, Registry(context)))
