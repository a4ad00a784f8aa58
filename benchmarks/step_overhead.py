"""Share of a step that is neither generation, reward, training nor weight sync.

`python benchmarks/step_overhead.py [RUN_DIR]` reads the run's `metrics.jsonl`. The aim is at most 5 %.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from analysis import RunNotFoundError, load_run
from analysis.frames.steps import phase_seconds

WORK = ["generate", "reward", "train", "update_weights"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run_dir", type=Path, nargs="?", default=Path("runs/demo"), help="default: %(default)s"
    )
    parser.add_argument(
        "--skip", type=int, default=1, help="steps to leave out at the start: warm-up (default: 1)"
    )
    args = parser.parse_args()
    try:
        run = load_run(args.run_dir)
    except RunNotFoundError as error:
        print(f"nothing to measure: {error} `make demo` makes one.")
        return
    seconds = phase_seconds(run.steps).iloc[args.skip :]
    if seconds.empty:
        print(f"nothing to measure: {args.run_dir} has no more than {args.skip} trained steps")
        return
    report(seconds)


def report(seconds: pd.DataFrame) -> None:
    total = seconds.to_numpy().sum()
    print(f"{len(seconds)} steps, {total / len(seconds):.3f} s each")
    for phase in seconds.columns:
        print(f"  {phase:<15} {seconds[phase].mean():8.3f} s  {seconds[phase].sum() / total:6.1%}")
    overhead = 1 - seconds[WORK].to_numpy().sum() / total
    print(f"step overhead: {overhead:.1%} of the step (aim: at most 5 %)")


if __name__ == "__main__":
    main()
