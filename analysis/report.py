"""`python -m analysis.report RUN_DIR [-o FILE.html]`: one page with curves, findings and all samples to read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis._errors import RunNotFoundError
from analysis._html import browse, dashboard_png
from analysis._load import load_run
from hpc.layout import RunLayout


def main(argv: list[str] | None = None) -> int:
    """Write the page and print where it is; 2 if there is no such run."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report", description="Write a run as one HTML page."
    )
    parser.add_argument("run_dir", type=Path, help="directory of the run, for example runs/demo")
    parser.add_argument(
        "-o", "--output", type=Path, help="page to write (default: RUN_DIR/plots/report.html)"
    )
    parser.add_argument("--max-samples", type=int, default=10_000, metavar="N",
                        help="leave out groups beyond so many samples (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--no-dashboard", action="store_true", help="leave out the picture, which needs matplotlib"
    )
    args = parser.parse_args(argv)
    if args.max_samples < 1:
        parser.error("--max-samples must be at least 1")
    try:
        run = load_run(args.run_dir)
    except RunNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    picture = None if args.no_dashboard else dashboard_png(run)
    print(
        browse(run, args.max_samples, picture=picture).save(
            args.output or RunLayout(args.run_dir).plots / "report.html"
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
