"""Show runs: state, reason, queue ETA, step, reward, attempts, GPU-hours.

All runs of the runs directory, or those named. Slurm is asked once for all of them together (one sacct, one
squeue); without Slurm the table says what the runs' own files say.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from hpc import cli
from hpc.runs.find import find_private
from hpc.runs.state import RunStatus, look
from hpc.slurm.client import SlurmClient
from rltrain.run.terminal import safe_text, visible

EXAMPLE = "python -m hpc.status demo          # python -m hpc.status --json | jq '.[] | .name'"
COLUMNS = ("run", "state", "step", "reward", "attempts", "gpu-hours", "eta", "job", "reason")

_STYLES = {
    **dict.fromkeys(("running", "RUNNING", "finished"), "green"),
    **dict.fromkeys(("submitted", "stopped", "PENDING", "CONFIGURING", "COMPLETING"), "yellow"),
    **dict.fromkeys(
        ("failed", "lost", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "CANCELLED"), "red"
    ),
}


def status(
    runs: Sequence[str | Path] = (), runs_dir: str | Path = "runs", client: SlurmClient | None = None
) -> list[RunStatus]:
    """The status of these runs (names or directories; none: all in `runs_dir`), the one that changed last at the end.

    Raises:
        UserError: there is no such run.
    """
    return look(runs, Path(runs_dir), client)[0]


def row(run: RunStatus, now: datetime) -> tuple[str, ...]:
    """The cells of a run's line in the table."""
    return (
        run.name,
        run.state,
        f"{run.step}/{'?' if run.num_rollout is None else run.num_rollout}",
        "-" if run.reward is None else f"{run.reward:.3f}",
        str(run.attempts),
        "-" if run.gpu_hours is None else f"{run.gpu_hours:.2f}",
        "-" if run.expected_start is None else describe_eta(run.expected_start, now),
        (run.job_id or "-") + (f" +{run.spare_jobs}" if run.spare_jobs else ""),
        shorten(run.reason or "-"),
    )


def describe_eta(start: datetime, now: datetime) -> str:
    """When a job may start, seen from now: `in 2:05 h`, `in 7 min`, `now`."""
    minutes = round((start - now).total_seconds() / 60)
    if minutes < 1:
        return "now"
    return f"in {minutes} min" if minutes < 60 else f"in {minutes // 60}:{minutes % 60:02d} h"


def shorten(text: str, limit: int = 80) -> str:
    """The text, shortened to fit a column."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def main(argv: list[str]) -> int:
    """The command line; returns an exit code."""
    parser = cli.make_parser("hpc.status", __doc__, EXAMPLE)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="name or directory (default: all runs)")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    cli.add_runs_dir(parser)
    args = parser.parse_args(argv)
    found, problem = look(args.runs, args.runs_dir, None)
    if args.json:
        cli.print_json([{**dataclasses.asdict(run), "is_active": run.is_active} for run in found])
    elif not found:
        print(f"there are no runs in {args.runs_dir}. `python -m hpc.submit` starts one.")
    else:
        cli.print_table(COLUMNS, [row(run, datetime.now(UTC)) for run in found], _STYLES)
    if not args.runs and (private := find_private(args.runs_dir)):
        names = ", ".join(path.name for path in private)
        print(f"skipped (no permission to read): {visible(names)}", file=sys.stderr)
    if problem:
        print(
            f"warning: Slurm could not be asked, so this is what the runs' files say: {safe_text(problem)}",
            file=sys.stderr,
        )
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
