"""`python -m analysis.export RUN_DIR… --frame samples (--json | --parquet FILE)`: a frame for other tools."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from analysis._errors import RunNotFoundError
from analysis._load import load_runs

FRAMES = ["runs", "attempts", "steps", "groups", "samples", "evals", "events"]


def main(argv: list[str] | None = None) -> int:
    """Write one frame of one or several runs; 2 if there is no such run."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.export", description="Write a frame for other tools."
    )
    parser.add_argument(
        "runs", nargs="+", help="directories of runs, patterns, or directories that hold runs"
    )
    parser.add_argument("--frame", choices=FRAMES, default="steps", help="default: %(default)s")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--json", action="store_true", help="print one JSON object a row")
    target.add_argument("--parquet", type=Path, metavar="FILE", help="write a Parquet file")
    args = parser.parse_args(argv)
    try:
        frame: pd.DataFrame = getattr(load_runs(args.runs), args.frame)
    except RunNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        sys.stdout.write(frame.to_json(orient="records", lines=True, date_format="iso", date_unit="us"))
    else:
        _plain(frame).to_parquet(args.parquet, index=False)
        print(args.parquet)
    return 0


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of mixed types, such as a flag that is a number in one run and text in another, as text."""
    mixed = [
        name
        for name in frame
        if frame[name].dtype == object and len({type(value) for value in frame[name].dropna()}) > 1
    ]
    return frame.assign(**{str(name): frame[name].map(str, na_action="ignore") for name in mixed})


if __name__ == "__main__":
    sys.exit(main())
