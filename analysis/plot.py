"""`python -m analysis.plot RUN_DIR [-o FILE.png]`: the overview picture of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis._errors import RunNotFoundError
from analysis._load import load_run
from analysis._run import Run
from hpc.layout import RunLayout


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
    try:
        run = load_run(args.run_dir)
    except RunNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output = args.output or RunLayout(args.run_dir).plots / "reward_curve.png"
    save_overview(run, output)
    print(output)
    return 0


def save_overview(run: Run, path: Path) -> None:
    """Write `analysis.plots.overview` of the run to `path`, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from analysis.plots import overview

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = overview(run)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
