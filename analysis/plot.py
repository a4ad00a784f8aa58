"""`python -m analysis.plot RUN_DIR [-o FILE.png]`: the overview picture of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis.plots.figures import overview, save_picture
from analysis.run import load_run
from rltrain.run.errors import run_main
from rltrain.run.layout import RunLayout


def main(argv: list[str] | None = None) -> int:
    """Draw the picture and print where it is; 2 if there is no such run."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.plot", description="Draw the overview of a run."
    )
    parser.add_argument("run_dir", type=Path, help="directory of the run, for example runs/demo")
    parser.add_argument(
        "-o", "--output", type=Path, help="picture to write (default: RUN_DIR/plots/reward_curve.png)"
    )
    args = parser.parse_args(argv)
    return run_main(lambda: _draw(args.run_dir, args.output))


def _draw(run_dir: Path, output: Path | None) -> None:
    run = load_run(run_dir)
    output = output or RunLayout(run_dir).plots / "reward_curve.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    save_picture(overview, run, output, dpi=150)
    print(output)


if __name__ == "__main__":
    sys.exit(main())
