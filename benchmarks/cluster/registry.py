"""The job's registry with as many roles as a job of 1000 nodes and more has, over real sockets.

python benchmarks/cluster/registry.py [ROLES]

Roles register one after the other from threads of another process, while others wait for all of them, as ranks do.
Ratio: seconds a role with all of them, against a tenth (1 is linear); and against nobody waiting. Each waiter gets only
the first role's address at the end, as all but trainer rank 0 do.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from hpc.supervisor.registry import RegistryServer
from rltrain.run.files import EventLog, StatusFile
from rltrain.run.role import Registry, RoleContext

TOKEN, CLIENTS, WAITERS = "benchmark", 16, 100


def client(url: str, role: str, index: int) -> Registry:
    """As a role has it."""
    return Registry(RoleContext(Path(), 0, role, index, url, TOKEN))


def all_roles(url: str, count: int, waiters: int) -> None:
    """Register, and wait for the last; runs in a process of its own."""
    last = f"rank-{count - 1}"
    waiting = [
        threading.Thread(target=client(url, "trainer", i).await_offer, args=(last, 600.0))
        for i in range(waiters)
    ]
    for thread in waiting:
        thread.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda i: client(url, "engine", i).register(f"http://10.0.0.1:{i}"), range(count)))
    client(url, "engine", 0).offer(last, "all are there")
    for thread in waiting:
        thread.join()


def measure(count: int, waiters: int) -> tuple[float, float]:
    """Seconds of processor time of this process, which serves, and megabytes that it has grown by."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        server = RegistryServer(TOKEN, EventLog(place / "events", 0), StatusFile(place / "status", 0))
        before, begun = psutil.Process().memory_info().rss, time.process_time()
        subprocess.run([sys.executable, __file__, server.url, str(count), str(waiters)], check=True)
        seconds, grown = time.process_time() - begun, psutil.Process().memory_info().rss - before
        server.close()
    return seconds, grown / 2**20


def main() -> None:
    """Print the ratios."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    measure(100, 10)  # warm
    tenth, _ = measure(count // 10, WAITERS)
    alone, _ = measure(count, 0)
    whole, grown = measure(count, WAITERS)
    print(f"{count} roles, {WAITERS} waiters: {whole:.1f} s of processor time, {grown:.0f} MB")
    print(f"  seconds a role against a tenth of them: {whole / (10 * tenth):.2f}")
    print(f"  against nobody waiting: {whole / alone:.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        all_roles(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
