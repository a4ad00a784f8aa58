"""Where the seconds of a start go: from `python -m hpc.submit`, or from a requeue, to the first step.

`python benchmarks/cluster/start_up.py [--rounds 3] [RUN_DIR …]`

Without a run directory: a job on this machine with a tiny Qwen3 (2 layers of 64, so that nearly all of a start is
imports), alternating with a bare start of its engine. Each job is submitted twice: the second goes on from the
checkpoint of the first, as a requeued one does. Each row of the table is when something was there, in seconds since the
attempt began, and since the row before; the medians of all rounds. What comes after the engine is waited for, the rest
goes on beside it; on few cores it takes turns with it, so the processor time of all is printed, too.

With run directories: the same table for every attempt of them that has trained, from their files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.tiny_model import make_model

from rltrain.run.files import read_lines
from rltrain.run.layout import RunLayout
from rltrain.sglang.adapter import HttpServerEngineAdapter

Marks = dict[str, float]
STEPS = 2
FLAGS = """
 --label-key label --rm-type exact --rollout-batch-size 4 --n-samples-per-prompt 4 --rollout-max-response-len 12
 --save-interval 1 --wandb-mode disabled
"""
READY = {
    "router": "router",
    "rollout": "rollout process",
    "trainer": "trainer: imports, process group",
    "engine": "engine",
}


def main() -> None:
    """Measure, or read, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR")
    args = parser.parse_args()
    for root in args.runs:
        layout = RunLayout(root)
        for attempt in sorted({row["attempt"] for row in trained(layout)}):
            show(f"{root}, attempt {attempt}", [marks_of(layout, attempt)])
    if not args.runs:
        with tempfile.TemporaryDirectory(prefix="slurmlime-") as directory:
            measure(Path(directory), args.rounds)


def measure(directory: Path, rounds: int) -> None:
    """Bare starts, first starts and requeued ones, in turns."""
    model, prompts = make_model(directory / "model"), directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"{i}+{i}=", "label": "0"}) + "\n" for i in range(100)))
    bare: list[tuple[float, float]] = []
    found: dict[str, list[Marks]] = {"first start": [], "requeued start": []}
    for number in range(rounds):
        bare.append(bare_start(model))
        for attempt, what in enumerate(found):
            words = [*FLAGS.split(), "--hf-checkpoint", str(model), "--prompt-data", str(prompts)]
            words += [f"--name=run-{number}", f"--runs-dir={directory / 'runs'}"]
            found[what].append(
                submit([*words, f"--num-rollout={STEPS * (attempt + 1)}"], directory, number, attempt)
            )
    engine = statistics.median(seconds for seconds, _ in bare)
    print(f"bare start of an engine: {engine:.1f} s ({' '.join(f'{each:.1f}' for each, _ in bare)}),"
          f" processor time {statistics.median(cpu for _, cpu in bare):.1f} s; {os.cpu_count()} cores")  # fmt: skip
    for what, marks in found.items():
        show(what, marks)
        ready = statistics.median(each["first step"] for each in marks)
        print(
            f"  to the first step: {ready / engine:.2f} × the bare start of an engine (aim: requeued ≤ 1.1)"
        )


def bare_start(model: Path) -> tuple[float, float]:
    """Seconds until a server answers, and those of processor time."""
    began, cpu = time.perf_counter(), processor_seconds()
    with HttpServerEngineAdapter.launch({"model_path": str(model)}, "benchmark"):
        seconds = time.perf_counter() - began
    return seconds, processor_seconds() - cpu


def submit(words: Sequence[str], directory: Path, number: int, attempt: int) -> Marks:
    """Marks of a job that runs to its end."""
    began, cpu = time.time(), processor_seconds()
    command = [sys.executable, "-m", "hpc.submit", *words]
    with (directory / "output.txt").open("w+") as output:
        done = subprocess.run(
            command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        output.seek(0)
        if done.returncode:
            sys.exit(f"hpc.submit ended with {done.returncode}:\n{output.read()[-3000:]}")
    marks = marks_of(RunLayout(directory / "runs" / f"run-{number}"), attempt)
    return {
        "processor time of all": processor_seconds() - cpu,
        "command": began - marks.pop("began"),
        **marks,
    }


def processor_seconds() -> float:
    """Of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def marks_of(layout: RunLayout, attempt: int) -> Marks:
    """When each part of a start was there, in seconds since the attempt began; `began` is that in Unix time."""
    events = [each for each in read_lines(layout.events) if each["attempt"] == attempt]
    start = first_time(events, "attempt_started")
    marks = {"began": start, "roles started": first_time(events, "role_started") - start}
    for role, what in READY.items():
        times = [each["time"] for each in events if each["kind"] == "role_ready" and each["role"] == role]
        if times:
            marks[f"{what} ready"] = max(times) - start
    marks["weights pushed"] = first_time(events, "weights_updated") - start
    row = next(each for each in trained(layout) if each["attempt"] == attempt)
    batch = row["time"] - row["perf/step_s"] + row["perf/rollout_s"] - start
    # The rest of the rollout is generation: its first tokens are there when that begins, but for a prefill.
    marks["generation began"] = batch - row.get("perf/generate_s", 0.0)
    marks["first batch there"] = batch
    marks["first step"] = batch + row["perf/train_s"]
    return marks


def trained(layout: RunLayout) -> list[dict[str, Any]]:
    """Metrics of steps."""
    return [each for each in read_lines(layout.metrics) if "perf/step_s" in each]


def first_time(events: Sequence[dict[str, Any]], kind: str) -> float:
    """Of the first event of a kind."""
    return next(each["time"] for each in events if each["kind"] == kind)


def show(what: str, all_marks: Sequence[Marks]) -> None:
    """Print the medians of the marks, in order of time."""
    medians = {
        name: statistics.median(marks[name] for marks in all_marks)
        for name in all_marks[0]
        if name != "began"
    }
    cpu = medians.pop("processor time of all", None)
    print(what + (f"; processor time of the whole job {cpu:.1f} s" if cpu else ""))
    before = min(medians.values())
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        print(f"  {seconds:7.2f} s  {seconds - before:+6.2f}  {name}")
        before = seconds


if __name__ == "__main__":
    main()
