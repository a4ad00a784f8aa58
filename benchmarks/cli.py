"""What the command line costs: start-up of `submit --dry-run`, and `status` of 500 runs.

`python benchmarks/cli.py [--runs 500]` compares a cold `python -m hpc.submit … --dry-run` with `python -c pass`,
alternating, and `hpc.status` of many runs with reading the same files bare. The job ids of the runs are asked of a
Slurm that is a script printing prepared lines, so that what is timed is ours; it counts its calls.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPEATS = 7
FAKE_SLURM = """#!/bin/sh
echo "$(basename "$0")" >> {log}
case "$(basename "$0")" in
  squeue) cat {squeue};;
  scontrol) echo "ClusterName = bench";;
esac
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=500, help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        start_up(Path(name))
        status(Path(name), args.runs)


def start_up(directory: Path) -> None:
    """Cold processes; the first of each is a warm-up of the page cache."""
    env = {**os.environ, "PATH": "/nowhere"}
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "hpc.submit --dry-run": [sys.executable, "-m", "hpc.submit", "--dry-run"],
        "hpc.submit --partition x --dry-run": [
            sys.executable,
            "-m",
            "hpc.submit",
            "--partition=x",
            "--dry-run",
        ],
        "hpc.status --help": [sys.executable, "-m", "hpc.status", "--help"],
    }
    seconds: dict[str, list[float]] = {label: [] for label in commands}
    for _ in range(REPEATS + 1):
        for label, command in commands.items():
            start = functools.partial(subprocess.run, command, cwd=directory, env=env, capture_output=True)
            seconds[label].append(timed(start))
    bare = statistics.median(seconds["python -c pass"][1:])
    for label, times in seconds.items():
        own = statistics.median(times[1:])
        spread = f"{min(times[1:]):.3f} to {max(times[1:]):.3f}"
        print(f"  {label:<36} {own:6.3f} s ({spread}), {own - bare:+.3f} s, {own / bare:.1f} × bare")
    print("start-up: aim: less than 0.35 s more than python -c pass")


def status(directory: Path, count: int) -> None:
    runs, log = directory / "runs", directory / "calls"
    make_runs(runs, count)
    env = fake_slurm(directory, count, log)
    command = [sys.executable, "-m", "hpc.status", "--json", "--runs-dir", str(runs)]
    found = json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    assert len(found) == count and {run["state"] for run in found} == {"PENDING"}
    calls = log.read_text().split()
    own = median(lambda: subprocess.run(command, env=env, capture_output=True, check=True))
    bare = median(lambda: [path.read_bytes() for path in runs.glob("*/*") if path.is_file()])
    print(f"status of {count} runs: {own:.2f} s; reading their files bare: {bare:.3f} s; {own / bare:.1f} × bare;"
          f" calls of Slurm's commands: {', '.join(calls)}")  # fmt: skip


def fake_slurm(directory: Path, count: int, log: Path) -> dict[str, str]:
    """An environment with a Slurm in which the jobs of so many runs wait; it writes its calls to `log`."""
    bin_dir, squeue = directory / "bin", directory / "squeue.txt"
    bin_dir.mkdir(parents=True)
    squeue.write_text("".join(squeue_line(1000 + i) for i in range(count)))
    for program in ("squeue", "scontrol"):
        path = bin_dir / program
        path.write_text(FAKE_SLURM.format(log=log, squeue=squeue))
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"}


def make_runs(runs: Path, count: int) -> None:
    """Runs of one attempt and 100 steps that have ended, and wait as a job again."""
    rows = [
        {"step": step, "attempt": 0, "rollout/reward": 0.5, **{f"m{j}": 0.1 for j in range(25)}}
        for step in range(100)
    ]
    kinds = ["attempt_started", *["role_started", "role_ready"] * 4, *["weights_updated"] * 8]
    kinds += ["checkpoint_saved", "stop_requested", "attempt_finished"]
    events = [
        {"time": 1.7e9 + second, "attempt": 0, "kind": kind, "host": "node", "state": "stopped"}
        for second, kind in enumerate(kinds)
    ]
    metrics, happened = ("".join(json.dumps(row) + "\n" for row in each) for each in (rows, events))
    for i in range(count):
        root = runs / f"run-{i:03d}"
        (root / "logs" / "attempt_0").mkdir(parents=True)
        train = "".join(f"flag_{j} = {j}\n" for j in range(120))
        (root / "config.toml").write_text(f"[flags]\nlr = 1\n[train]\n{train}num_rollout = 200\n")
        (root / "status.json").write_text('{"phase": "training", "step": 99}')
        (root / "metrics.jsonl").write_text(metrics)
        (root / "events.jsonl").write_text(happened)
        entry = {
            "job_id": str(1000 + i),
            "components": [],
            "cluster": "bench",
            "layout": "plain",
            "submitted": None,
        }
        (root / "job.json").write_text(json.dumps([entry]))


def squeue_line(job: int) -> str:
    from hpc.slurm.parse import DELIMITER, SQUEUE_COLUMNS

    fields = {"JobID": str(job), "JobIDRaw": str(job), "State": "PENDING", "NNodes": "1", "Elapsed": "0:00",
              "Reason": "Priority"}  # fmt: skip
    return DELIMITER.join(fields.get(name, "") for name in SQUEUE_COLUMNS) + "\n"


def median(work: Callable[[], object]) -> float:
    work()
    return statistics.median(timed(work) for _ in range(REPEATS))


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
