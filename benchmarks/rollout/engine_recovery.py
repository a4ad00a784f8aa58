"""From an engine's death to full strength, against a bare start of the same engine.

python benchmarks/rollout/engine_recovery.py

A running fleet (router, two engines, rollout process, a supervisor) loses an engine to SIGKILL. It is whole again when
both engines are behind the router with the current weights. Deaths and bare starts alternate. Besides the start, the
time holds the supervisor's noticing, its pause of one second before the first restart (two before the second), and
joining the router. A tiny Qwen3 (2 layers of 64), so that nearly all of a start is imports.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.fleet import Fleet, running_fleet, wait_until

from rltrain.sglang.adapter import HttpServerEngineAdapter

ROUNDS = 2


def bare_start(model: Path) -> float:
    """Seconds until a server answers."""
    began = time.perf_counter()
    with HttpServerEngineAdapter.launch({"model_path": str(model)}, "benchmark"):
        return time.perf_counter() - began


def recovery(fleet: Fleet, index: int) -> float:
    """Seconds from the death of an engine to full strength."""
    url = next(each.url for each in fleet.registry.find("engine") if each.index == index)
    fleet.server(index).kill()
    began = time.perf_counter()
    wait_until(lambda: url not in [each.url for each in fleet.registry.find("engine")])
    wait_until(lambda: fleet.is_whole(1))
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    starts, recoveries = [], []
    with (
        tempfile.TemporaryDirectory(prefix="slurmlime-") as directory,
        running_fleet(Path(directory)) as fleet,
    ):
        for index in range(ROUNDS):
            starts.append(bare_start(fleet.models[0]))
            recoveries.append(recovery(fleet, index % 2))
    bare, ours = statistics.median(starts), statistics.median(recoveries)
    print(f"bare start     {bare:6.1f} s   {' '.join(f'{each:.1f}' for each in starts)}")
    print(f"full strength  {ours:6.1f} s   {' '.join(f'{each:.1f}' for each in recoveries)}")
    print(f"ratio {ours / bare:.2f}")


if __name__ == "__main__":
    main()
