"""`python -m analysis.export RUN_DIR… (--json | --parquet FILE | --csv FILE)`: frames for other tools."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.reading.samples import Columns
from analysis.runs import Runs, load_runs
from rltrain.run.errors import UserError, run_main

FRAMES = ["runs", "attempts", "steps", "groups", "samples", "evals", "events", "sessions", "notes"]
SAMPLE_FRAMES = ["tokens", "messages"]


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `_parser` says what each is."""

    runs: list[str]
    frame: str
    columns: Columns
    sample: int | None
    long: bool
    sacct: bool
    json: bool
    parquet: Path | None
    csv: Path | None


def main(argv: list[str] | None = None) -> int:
    """Write one frame of one or several runs; 2 if there is no such run, sample or accounting."""
    options = Options(**vars(_parser().parse_args(argv)))
    return run_main(lambda: _export(options))


def _export(options: Options) -> None:
    frame = _frame(load_runs(options.runs), options)
    if options.csv:
        frame.to_csv(options.csv, index=False, date_format="%Y-%m-%dT%H:%M:%S.%f%z")
        print(options.csv)
    elif options.json:
        sys.stdout.write(frame.to_json(orient="records", lines=True, date_format="iso", date_unit="us"))
    else:
        _plain(frame).to_parquet(options.parquet, index=False)
        print(options.parquet)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.export", description="Write a frame for other tools."
    )
    parser.add_argument(
        "runs", nargs="+", help="directories of runs, patterns, or directories that hold runs"
    )
    parser.add_argument(
        "--frame", choices=[*FRAMES, *SAMPLE_FRAMES], default="steps", help="default: %(default)s"
    )
    parser.add_argument("--columns", choices=["scalars", "text", "tokens", "all"], default="scalars",
                        help="of samples and evals (default: %(default)s)")  # fmt: skip
    parser.add_argument("--sample", type=int, metavar="INDEX", help="whose tokens or messages")
    parser.add_argument("--long", action="store_true", help="steps: one row a step and metric")
    parser.add_argument("--sacct", action="store_true", help="attempts: as Slurm's accounting has them")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--json", action="store_true", help="print one JSON object a row")
    target.add_argument("--parquet", type=Path, metavar="FILE", help="write a Parquet file")
    target.add_argument("--csv", type=Path, metavar="FILE", help="write a CSV file")
    return parser


def _frame(runs: Runs, options: Options) -> pd.DataFrame:
    """The frame that the command line asks for.

    Raises:
        UserError: `--sample` is missing, or there is no such sample; or see `Run.read_attempts`.
    """
    if options.frame in SAMPLE_FRAMES:
        if options.sample is None:
            raise UserError(f"--frame {options.frame} takes --sample INDEX, the index of a training sample.")
        return runs.each(lambda run: getattr(run, options.frame)(options.sample))
    if options.frame == "samples":
        return runs.read_samples(options.columns)
    if options.frame == "evals":
        return runs.each(lambda run: run.read_evals(options.columns))
    if options.frame == "attempts" and options.sacct:
        return runs.each(lambda run: run.read_attempts())
    return (
        runs.read_steps(long=True)
        if options.frame == "steps" and options.long
        else getattr(runs, options.frame)
    )


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
