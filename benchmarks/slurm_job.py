"""What a job on Slurm costs: submitting it, and being preempted. On a sandbox of its own (`make slurm`).

python benchmarks/slurm_job.py

Submission: planning, rendering and submitting a held job against bare `sbatch` of the same script, and the whole
command against both. Preemption: a real run of a tiny model (2 trainer ranks, 2 engines, 4 nodes) makes way for a job
of higher priority. Measured are the seconds from the warning to the checkpoint, and from the start of the next attempt
to its first step against the same of the first attempt.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.tiny_model import make_model

from hpc.sandbox import MissingPackagesError, Sandbox, require_packages
from hpc.submitting.command_line import read_request
from hpc.submitting.start_run import submit_run
from rltrain.run.layout import RunLayout

REPEATS = 7
STEPS = 25


def main() -> None:
    try:
        require_packages(accounting=False)
    except MissingPackagesError as error:
        sys.exit(f"skipped: {error}")
    with (
        tempfile.TemporaryDirectory(prefix="slurm-bench-") as name,
        Sandbox(Path(name) / "s", owner_pid=os.getpid()) as cluster,
    ):
        os.environ |= cluster.variables | {"OMP_NUM_THREADS": "1"}
        flags = inputs(Path(name))
        submission(Path(name), cluster, flags)
        preemption(Path(name), cluster, flags)


def inputs(directory: Path) -> list[str]:
    """Flags of a small run."""
    model = make_model(directory / "model")
    prompts = directory / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"input": f"{i}+{i}=", "label": str(2 * i)}) + "\n" for i in range(100))
    )
    return [
        *(
            "--hf-checkpoint",
            str(model),
            "--prompt-data",
            str(prompts),
            "--label-key",
            "label",
            "--rm-type",
            "exact",
        ),
        *("--num-gpus-per-node=1", "--nodes=4", "--rollout-batch-size=4", "--n-samples-per-prompt=4"),
        *(
            "--rollout-max-response-len=12",
            "--save-interval=100",
            f"--num-rollout={STEPS}",
            "--wandb-mode=offline",
        ),
        *("--runs-dir", str(directory / "runs"), "--detach"),
    ]


def submission(directory: Path, cluster: Sandbox, flags: list[str]) -> None:
    seconds: dict[str, list[float]] = {"sbatch": [], "ours": [], "command": []}
    for number in range(REPEATS + 1):
        held = [*flags, "--partition=gpu", "--slurm.sbatch.hold"]
        request = read_request([*held, f"--name=ours-{number}"])
        seconds["ours"].append(timed(lambda request=request: submit_run(request.options, request.train)))
        script = directory / "runs" / f"ours-{number}" / "job.sbatch"
        bare = ["sbatch", "--parsable", str(script)]
        seconds["sbatch"].append(
            timed(lambda bare=bare: subprocess.run(bare, check=True, capture_output=True))
        )
        whole = [sys.executable, "-m", "hpc.submit", *held, f"--name=command-{number}"]
        seconds["command"].append(
            timed(lambda whole=whole: subprocess.run(whole, check=True, capture_output=True))
        )
        cluster.run("scancel", "--state=PENDING")
    bare_s = statistics.median(seconds["sbatch"][1:])
    for label, times in seconds.items():
        own = statistics.median(times[1:])
        print(
            f"  {label:<8} {own:6.3f} s ({min(times[1:]):.3f} to {max(times[1:]):.3f}), {own / bare_s:.1f} × sbatch"
        )
    print(
        "submission: sbatch of the script; planned, rendered and submitted in one process; the whole command"
    )


def preemption(directory: Path, cluster: Sandbox, flags: list[str]) -> None:
    request = read_request([*flags, "--partition=lowgrace", "--name=preempted"])
    with contextlib.redirect_stdout(io.StringIO()):
        submit_run(request.options, request.train)
    layout = RunLayout(directory / "runs" / "preempted")
    wait_until(lambda: len(lines(layout.metrics)) >= 3)
    node = next(
        each["host"] for each in lines(layout.events) if each.get("role") == "engine" and "host" in each
    )
    rival = directory / "rival.sbatch"
    rival.write_text("#!/bin/bash\nsleep 1\n")
    cluster.run("sbatch", "--output=/dev/null", "-p", "high", "-w", node, "--exclusive", str(rival))
    wait_until(lambda: any(row["attempt"] == 1 for row in lines(layout.metrics)))
    events, rows = lines(layout.events), lines(layout.metrics)
    at = functools.partial(moment, events)
    saved = at("checkpoint_saved", 0) - at("stop_requested", 0)
    first = [
        next(row["time"] for row in rows if row["attempt"] == attempt) - at("attempt_started", attempt)
        for attempt in (0, 1)
    ]
    step = statistics.median(row["perf/step_s"] for row in rows if "perf/step_s" in row)
    print(f"preemption: saved {saved:.2f} s after the warning (a step takes {step:.2f} s)")
    print(f"  first step {first[1]:.1f} s after the requeued start, {first[0]:.1f} s after the cold one:"
          f" {first[1] / first[0]:.2f} ×")  # fmt: skip
    queued = at("attempt_started", 1) - at("attempt_finished", 0)
    print(
        f"  {queued:.1f} s in Slurm's hands between the attempts, of which the sandbox's credentials take 5"
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def moment(events: list[dict[str, Any]], kind: str, attempt: int) -> float:
    return next(each["time"] for each in events if each["kind"] == kind and each["attempt"] == attempt)


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("it did not happen in five minutes")
        time.sleep(0.1)


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
