"""`python -m analysis.demo_data DIR`: recorded runs to try the analysis on, without training anything.

The same arguments write the same bytes. Four runs of a model that learns to add:

- `baseline` is preempted once and goes on from its checkpoint; a quarter of its prompts use a tool
- `fast` has a larger learning rate and newer packages, and is finished sooner
- `hacked` earns reward with ever longer answers, while its entropy collapses and trainer and engine part
- `crashed` ends in a failure
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis.demo.run import DemoRun, Size, write_run
from analysis.demo.samples import Behaviour
from rltrain.run.errors import UserError, run_main


def demo_runs(steps: int = 24) -> list[DemoRun]:
    """The runs that `write_demo` writes."""
    half = steps // 2
    return [
        DemoRun("baseline", ((0, half + 2), (half, steps)), Behaviour(speed=8)),
        DemoRun("fast", ((0, steps),), Behaviour(speed=14), lr=3e-5, torch="2.14.0"),
        DemoRun("hacked", ((0, steps),), Behaviour(speed=8, filler=9, collapse=True, drift=0.004)),
        DemoRun("crashed", ((0, max(3, steps // 4)),), Behaviour(speed=8), end="failed"),
    ]


def write_demo(root: Path, *, steps: int = 24, seed: int = 0) -> list[Path]:
    """Write all runs below `root`; returns their directories."""
    size = Size(steps, seed=seed)
    return [write_run(root / run.name, run, size) for run in demo_runs(steps)]


def main(argv: list[str] | None = None) -> int:
    """Write the runs and say where they are."""
    description = "Write recorded runs to try the analysis on."
    parser = argparse.ArgumentParser(prog="python -m analysis.demo_data", description=description)
    parser.add_argument("directory", type=Path, help="directory that the runs are written below")
    parser.add_argument(
        "--steps", type=int, default=24, help="of a whole run, at least 8 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.steps < 8:
        parser.error("--steps must be at least 8")
    return run_main(lambda: _write(args.directory, args.steps, args.seed))


def _write(directory: Path, steps: int, seed: int) -> None:
    existing = [run.name for run in demo_runs() if (directory / run.name).exists()]
    if existing:
        raise UserError(f"{directory} already holds {', '.join(existing)}: choose another directory.")
    for path in write_demo(directory, steps=steps, seed=seed):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
