"""`python -m analysis.trace RUN_DIR [-o FILE] [--steps N …]`: where the time went, for https://ui.perfetto.dev.

The file is in Chrome's trace format: one process with the phases of every step, another one with the samples, one
thread each. Phases follow one another in the order of the training loop. Of a sample only is known how long it waited,
generated and was graded, all of its requests together: its spans begin with its rollout and follow one another.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.run import load_run
from rltrain.run.errors import UserError, run_main

Event = dict[str, Any]
_STEPS, _SAMPLES = 1, 2  # process ids
_PHASES = ("rollout", "train", "save", "update_weights")
_OF_TRAINING = ("ref_log_probs", "teacher_log_probs", "log_probs", "critic_train", "actor_train")
_OF_GENERATION = {"prefill": "prefill_seconds", "decode": "decode_seconds", "tools": "tool_seconds"}


def main(argv: list[str] | None = None) -> int:
    """Write the trace; 2 if there is no such run or step."""
    parser = argparse.ArgumentParser(prog="python -m analysis.trace", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", type=Path, help="directory of the run, for example runs/demo")
    parser.add_argument("-o", "--output", type=Path, help="default: trace.json in the run's directory")
    parser.add_argument("--steps", type=int, nargs="+", help="only these (default: all)")
    args = parser.parse_args(argv)
    return run_main(lambda: _write(args.run_dir, args.output or args.run_dir / "trace.json", args.steps))


def _write(run_dir: Path, output: Path, only: Sequence[int] | None) -> None:
    run = load_run(run_dir)
    steps = run.steps[run.steps["step"] >= 0]
    if only is not None:
        steps = steps[steps["step"].isin(only)]
    if steps.empty:
        raise UserError(f"{run_dir} has no such steps." if only else f"{run_dir} has no finished steps yet.")
    samples = run.read_samples(steps=[int(step) for step in steps["step"]])
    with output.open("w") as file:
        json.dump({"traceEvents": trace_events(steps, samples), "displayTimeUnit": "ms"}, file)
    print(output)


def trace_events(steps: pd.DataFrame, samples: pd.DataFrame) -> list[Event]:
    """The events of the trace, with times in µs since the first of the steps began."""
    ends = steps["time"].map(pd.Timestamp.timestamp)
    begins = ends - steps["perf/step_s"].fillna(0.0)
    zero = float(begins.min())
    events = [_name("process", _STEPS, "steps"), _name("process", _SAMPLES, "samples")]
    for (_, row), begin in zip(steps.iterrows(), begins - zero, strict=True):
        events += _step(row, float(begin))
        own = samples[samples["step"] == row["step"]].to_dict("records")
        for thread, sample in enumerate(own, start=1):
            events += _sample(sample, thread, float(begin))
    return events


def _step(row: pd.Series, begin: float) -> Iterator[Event]:
    """A step, below it its phases, and below training what that is made of."""
    yield _span(_STEPS, 1, f"step {row['step']}", begin, _seconds(row, "step"), {"step": int(row["step"])})
    for phase in _PHASES:
        seconds = _seconds(row, phase)
        if phase == "train":
            inner = begin
            for part in _OF_TRAINING:
                if length := _seconds(row, part):
                    yield _span(_STEPS, 1, part, inner, length)
                    inner += length
        if seconds:
            yield _span(_STEPS, 1, phase, begin, seconds)
        begin += seconds


def _sample(sample: Mapping[Any, Any], thread: int, begin: float) -> Iterator[Event]:
    told = ("step", "group_index", "index", "reward", "status", "prompt_length", "response_length")
    about = {name: sample[name] for name in told if pd.notna(sample[name])}
    wait, generate, reward = (
        float(sample[name] or 0.0) for name in ("queue_seconds", "generate_seconds", "reward_seconds")
    )
    if wait:
        yield _span(_SAMPLES, thread, "wait", begin, wait)
    begin += wait
    yield _span(_SAMPLES, thread, f"sample {sample['index']}", begin, generate, about)
    inner = begin
    for name, column in _OF_GENERATION.items():
        length = min(float(sample[column] or 0.0), begin + generate - inner)
        if length > 0:
            yield _span(_SAMPLES, thread, name, inner, length)
            inner += length
    if reward:
        yield _span(_SAMPLES, thread, "reward", begin + generate, reward)


def _seconds(row: pd.Series, phase: str) -> float:
    value = row.get(f"perf/{phase}_s")
    return 0.0 if value is None or pd.isna(value) else float(value)


def _span(
    process: int, thread: int, name: str, begin: float, seconds: float, about: Mapping[str, Any] | None = None
) -> Event:
    times = {"ts": round(begin * 1e6, 1), "dur": round(seconds * 1e6, 1)}
    return {"ph": "X", "pid": process, "tid": thread, "name": name, **times, "args": dict(about or {})}


def _name(kind: str, process: int, name: str) -> Event:
    return {"ph": "M", "pid": process, "name": f"{kind}_name", "args": {"name": name}}


if __name__ == "__main__":
    sys.exit(main())
