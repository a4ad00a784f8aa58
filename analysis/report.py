"""`python -m analysis.report RUN_DIR [-o FILE.html]`: one page with curves, findings and all samples to read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis.pages.html import browse, dashboard_png
from analysis.run import load_run
from rltrain.run.errors import run_main
from rltrain.run.layout import RunLayout


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
    return run_main(lambda: _write(args.run_dir, args.output, args.max_samples, not args.no_dashboard))


def _write(run_dir: Path, output: Path | None, max_samples: int, dashboard: bool) -> None:
    run = load_run(run_dir)
    picture = dashboard_png(run) if dashboard else None
    output = output or RunLayout(run_dir).plots / "report.html"
    print(browse(run, max_samples, picture=picture).save(output))


if __name__ == "__main__":
    sys.exit(main())
